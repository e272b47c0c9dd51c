"""How long a keeper waits for the first engine, on a clock that jumps instead of waiting."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from tenora.engine import keeper, messages
from tenora.engine.keeper import EngineKeeper
from tenora.engine.messages import Command, Event, Ready
from tenora.errors import UnavailableError
from tests.engine.fake import READY

PATIENCE = 300.0


class _NoWaiting(selectors.DefaultSelector):
    """Where a loop would wait, its clock jumps."""

    now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready and timeout:
            self.now += timeout
        return ready


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    selector = _NoWaiting()
    loop = asyncio.SelectorEventLoop(selector)
    monkeypatch.setattr(loop, "time", lambda: selector.now)
    monkeypatch.setattr(keeper.time, "monotonic", lambda: selector.now)
    yield loop.run_until_complete
    loop.close()


class _Slow:
    """An engine that says something every 200 s."""

    def __init__(self, words: list[Event]) -> None:
        self._words = words
        self._killed = asyncio.Event()

    async def open(self, on_event: Callable[[Event], None]) -> None:
        self._talk = asyncio.create_task(self._say(on_event))

    async def _say(self, on_event: Callable[[Event], None]) -> None:
        for word in self._words:
            await asyncio.sleep(200)
            on_event(word)

    def send(self, command: Command) -> None:
        self._killed.set()

    async def closed(self) -> str:
        await self._killed.wait()
        return "it was told to end"

    def kill(self) -> None:
        self._killed.set()
        self._talk.cancel()


def _kernels(done: int) -> Event:
    return messages.Loading(phase="kernels", done=done, total=140)


async def _start(words: list[Event]) -> Ready | None:
    subject = EngineKeeper(lambda: _Slow(words), on_event=lambda _: None, on_lost=lambda: None)
    try:
        await subject.start(PATIENCE)
        return subject.ready
    finally:
        await subject.close()


def test_an_engine_that_gets_on_is_waited_for_however_slow_it_is(run: Callable[[Any], Any]) -> None:
    words = [messages.Loading(phase="weights", done=1, total=2), *map(_kernels, range(20)), READY]
    assert run(_start(words)) == READY


def test_an_engine_that_stands_still_is_ended_with_what_it_said_last(run: Callable[[Any], Any]) -> None:
    with pytest.raises(UnavailableError, match=r"no progress for 300 s .* kernels, 42 of 140"):
        run(_start([_kernels(7), _kernels(42)]))
    with pytest.raises(UnavailableError, match="before its first word"):
        run(_start([]))
