from __future__ import annotations

import asyncio
import io
import logging

import pytest

from tenora.cli import serving
from tenora.cli.progress import StartProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_a_line_for_each_phase_and_one_every_two_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    progress = StartProgress(io.StringIO(), clock=lambda: now)
    with caplog.at_level(logging.INFO):
        for phase, done in [("weights", 0), ("weights", 50), ("kernels", 1)]:
            progress(phase, done, 100)
        for second in range(1, 11):
            now = second / 2
            progress("kernels", 10 * second, 100)
    assert caplog.messages == [
        "loading weights 0 %",
        "compiling kernels 1 of 100",
        "compiling kernels 40 of 100",
        "compiling kernels 80 of 100",
    ]


def test_silence_of_the_engine_is_not_silence_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    now = 0.0
    progress = StartProgress(io.StringIO(), clock=lambda: now)
    with caplog.at_level(logging.INFO):
        for second in range(7):
            now = float(second)
            progress.show()
    assert caplog.messages == ["starting the engine"] * 4


async def test_work_that_says_nothing_is_shown_all_the_same(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SHOW_SECONDS", 0.001)
    now, done = 0.0, asyncio.Event()
    progress = StartProgress(io.StringIO(), clock=lambda: now)
    progress("convert", 0, 3)

    def look() -> None:
        nonlocal now
        now += 1.0
        if now == 5.0:
            done.set()

    with caplog.at_level(logging.INFO):
        assert await serving.shown(done.wait(), progress, look)
    assert caplog.messages == ["converting the base 0 %"] * 2


def test_a_terminal_gets_a_bar_for_each_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    terminal = Terminal()
    with StartProgress(terminal) as progress:
        progress("weights", 60, 100)
        progress("kernels", 42, 140, 38)
    first, second = (line.rsplit("\r", 1)[1] for line in terminal.getvalue().rstrip().split("\n"))
    assert first.startswith("loading weights [########################] 100 %")
    assert second.startswith("compiling kernels [#######-----------------] 42 of 140, 38 of them found in the cache")
