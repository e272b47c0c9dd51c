"""What `tenora work` does: claim the worker's part, join the service and its engine, work, and the same backwards.

`tenora serve` starts it as `python -m tenora.cli.working`, with its settings on standard input.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import Awaitable
from pathlib import Path

import uvloop

from tenora.cli.places import ENGINE_SOCKET, WORKER_SOCKET
from tenora.config import Settings
from tenora.control.storage.directory import WORKER_LOCK, claim
from tenora.control.tokenizing.fair_threads import leave_threads
from tenora.control.worker.line import WorkerEnd
from tenora.control.worker.worker import Worker
from tenora.engine.client.client import AsyncEngine
from tenora.errors import ConfigurationError, TenoraError
from tenora.model.catalog import ResolvedModel
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tenora.processes import lower_priority
from tenora.telemetry import logs
from tenora.unix_socket import connect

NICE = 10
"""Added to the worker's niceness: where cores are short, whoever waits for an answer comes before who prepares rows."""

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Work until the service wants an end or is gone, or until SIGTERM or SIGINT.

    Raises:
        TenoraError: it could not start; the message says what to do.
    """
    logs.configure(settings.log_level)
    try:
        lower_priority(NICE)
    except OSError as error:
        log.warning("requests may wait for rows that are prepared: %s", error)
    lock = claim(settings.root, WORKER_LOCK)
    try:
        uvloop.run(_run(settings))
    finally:
        os.close(lock)
    leave_threads()


async def _run(settings: Settings) -> None:
    """Work; the first signal ends it gracefully, the second at once."""
    line = await join(settings)
    stop = line.stop

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await work(settings, line)
    finally:
        await line.close()


async def join(settings: Settings) -> WorkerEnd:
    """The line to the service on this state directory.

    Raises:
        ConfigurationError: there is none, or it never trains.
    """
    try:
        line = await WorkerEnd.open(connect(settings.root / WORKER_SOCKET))
    except OSError:
        line = None
    if line is None:
        raise ConfigurationError(
            f"No service that trains runs on {settings.root}. `tenora serve` starts one, and a worker with it."
        )
    return line


async def work(settings: Settings, line: WorkerEnd) -> None:
    """Work on jobs until `line.stop` is set, or until the service is gone and what was being prepared is."""
    engine = AsyncEngine.attached(settings, settings.root / ENGINE_SOCKET)
    try:
        if not await _first(engine.start(), line.stop.wait(), line.lost.wait()):
            return
        model = ResolvedModel(Path(line.welcome.directory), line.welcome.model_id)
        tokenizer = await asyncio.to_thread(Tokenizer.load, model.directory)
        spec = await asyncio.to_thread(ModelSpec.from_directory, model.directory)
        worker = await Worker.open(settings, engine, tokenizer, model, table_rows(spec), line.count)
        try:
            await worker.start()
            line.serve(worker.queue)
            log.info("the worker is at work")
            if not await _first(line.stop.wait(), line.lost.wait()):
                log.info("the service is gone; what is being prepared is finished, and runs wait for the next one")
                await _first(worker.retire(), line.stop.wait())
        finally:
            await worker.close()
    finally:
        await engine.close(0)


async def _first(*waits: Awaitable[object]) -> bool:
    """Wait until one of these has come; whether it is the first of them."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            tasks[0].result()
        return bool(tasks[0].done())
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def main() -> int:
    """Run as a child of `tenora serve`. Returns the exit status."""
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    try:
        run(settings)
    except TenoraError as error:
        log.critical("the worker could not start: %s", error.message)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
