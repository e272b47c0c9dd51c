"""`make demo`'s program, on the tiny base: what it prints, a second run, and Ctrl-C."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.e2e.serving import alive, until
from tests.support.patience import PATIENCE

PROGRAM = Path(__file__).parents[2] / "clients" / "demo" / "demo.py"


class Demo:
    """The program with a state directory of its own; its output goes to a file."""

    def __init__(self, home: Path, base: Path) -> None:
        self.home = home
        self.output = home.with_suffix(".out")
        kept = {key: value for key, value in os.environ.items() if not key.startswith("TENORA_")}
        own = {"TENORA_HOME": str(home), "TENORA_MODEL": str(base), "TENORA_THREADS": "1", "COLUMNS": "100"}
        self.environment = {**kept, **own}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        with self.output.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, str(PROGRAM), *arguments],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a group of its own, to which the test sends what a terminal would
            )
        return self.process

    def text(self) -> str:
        return self.output.read_text(errors="replace")

    def family(self) -> list[psutil.Process]:
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)
            self.process.wait(PATIENCE)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A shell starts what runs in the background with SIGINT ignored, and children inherit that: undo it here."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def demo(tmp_path: Path, tiny_base: Path, ctrl_c: None) -> Iterator[Demo]:
    one = Demo(tmp_path / "home", tiny_base)
    try:
        yield one
    finally:
        one.stop()


@pytest.mark.full
def test_two_runs_show_everything_and_leave_nothing_running(demo: Demo) -> None:
    for version in (1, 2):
        process = demo.start()
        until(lambda: "is ready at" in demo.text(), "the demo's server is ready")
        family = demo.family()
        assert process.wait(PATIENCE) == 0, demo.text()
        text = demo.text()
        assert f"adapter 'library-desk', version {version}" in text
        assert text.count("\nQ: ") == 3
        assert text.count("| adapter: library-desk") == 3
        base, adapter = (float(text.split(f"\n  {word} ")[1].split()[0]) for word in ("base", "adapter"))
        assert adapter < base
        for expected in (
            "Elapsed: ",
            "curl http://127.0.0.1:8000/v1/chat/completions",
            "from openai import OpenAI",
            "serve",
        ):
            assert expected in text
        assert str(demo.home / "credentials") in text
        assert (demo.home / "credentials").read_text().strip() not in text
        assert max(map(len, text.split("How to go on")[0].splitlines())) <= 120
        assert not any(alive(member) for member in family)


@pytest.mark.full
@pytest.mark.parametrize("moment", ["starting tenora serve", "training"])
def test_ctrl_c_stops_the_server_and_a_second_run_is_clean(demo: Demo, moment: str) -> None:
    process = demo.start()
    until(lambda: moment in demo.text() and len(demo.family()) > 0, moment)
    family = demo.family()
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(PATIENCE) == 130
    last = demo.text().splitlines()[-1]
    assert last == "Stopped. Nothing is left running, and `make demo` starts afresh."
    assert "Traceback" not in demo.text()
    assert not any(alive(member) for member in family)

    assert demo.start().wait(PATIENCE) == 0, demo.text()
    assert "adapter 'library-desk', version 1" in demo.text()


@pytest.mark.full
def test_keep_leaves_the_server_until_ctrl_c(demo: Demo) -> None:
    process = demo.start("--keep")
    until(lambda: "Ctrl-C stops it" in demo.text() or process.poll() is not None, "the demo has ended its show")
    assert process.poll() is None, demo.text()
    announced = json.loads((demo.home / "server.json").read_text())
    assert f"curl {announced['url']}/v1/chat/completions" in demo.text()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(PATIENCE) == 130
    assert not (demo.home / "server.json").exists()


def test_a_server_that_cannot_start_is_one_clear_message(demo: Demo, tmp_path: Path) -> None:
    demo.environment["TENORA_MODEL"] = str(tmp_path / "nowhere")
    assert demo.start().wait(PATIENCE) == 1
    assert "Traceback" not in demo.text()
    assert "nowhere" in demo.text()


@pytest.mark.full
def test_in_a_terminal_the_bars_redraw_in_place(demo: Demo) -> None:
    master, slave = pty.openpty()
    with os.fdopen(slave, "wb") as terminal:
        process = subprocess.Popen(
            [sys.executable, str(PROGRAM)],
            env={**demo.environment, "TERM": "xterm"},
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            start_new_session=True,
        )
    demo.process = process
    seen = b""
    with os.fdopen(master, "rb", buffering=0) as screen:
        while True:
            try:
                piece = screen.read(4096)
            except OSError:
                break  # Linux answers EIO when the last writer has closed the terminal
            if not piece:
                break
            seen += piece
    assert process.wait(PATIENCE) == 0, seen.decode(errors="replace")
    assert b"\rtraining [" in seen
    assert b"] succeeded" in seen
    assert seen.count(b"\n") < 80
