"""`tenora work` and signals: the first lets it save, the second ends it at once."""

from __future__ import annotations

import signal
import subprocess
import sys

from tests.support.patience import PATIENCE

PROGRAM = """
import asyncio
from tenora.cli import working
from tenora.config import Settings

class Line:
    def __init__(self):
        self.stop = asyncio.Event()
    async def close(self):
        print("closed", flush=True)

async def join(settings):
    return Line()

async def work(settings, line):
    print("at work", flush=True)
    await line.stop.wait()
    print("saving", flush=True)
    await asyncio.Event().wait()  # for ever

working.join, working.work = join, work
asyncio.run(working._run(Settings()))
"""


def test_a_second_signal_ends_a_worker_that_saves_at_once() -> None:
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE, text=True) as worker:
        try:
            assert worker.stdout is not None
            assert worker.stdout.readline() == "at work\n"
            worker.send_signal(signal.SIGTERM)
            assert worker.stdout.readline() == "saving\n"
            assert worker.poll() is None
            worker.send_signal(signal.SIGTERM)
            assert worker.wait(PATIENCE) == 128 + signal.SIGTERM
            assert worker.stdout.read() == "", "it ends there and then"
        finally:
            worker.kill()
