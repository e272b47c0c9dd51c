"""How long a supervisor waits for an engine, and what it does then, on a clock that jumps instead of waiting."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterator, Sequence
from itertools import pairwise
from typing import Any

import pytest

from tenora.engine import messages
from tenora.engine.client import supervisor
from tenora.engine.client.link import Link
from tenora.engine.client.supervisor import EngineSupervisor
from tenora.engine.messages import Command, EngineStats, Event, Heartbeat, Ready
from tenora.errors import UnavailableError
from tests.support.clock import Clock, JumpingLoop
from tests.support.scripted_engine import READY

PATIENCE = 300.0
HANG = 60.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def run(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    loop = JumpingLoop(clock)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: clock.now)
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


def _supervisor(link: Callable[[], Link]) -> EngineSupervisor:
    return EngineSupervisor(link, on_event=lambda _: None, on_lost=lambda: None, hang_seconds=HANG)


async def _start(words: list[Event]) -> Ready | None:
    subject = _supervisor(lambda: _Slow(words))
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


class _Scripted:
    """An engine that says each of `words` after its pause, and then nothing more for ever.

    Attributes:
        opened, ended: when, by the loop's clock.
    """

    def __init__(self, words: Sequence[tuple[float, Event]] = (), *, killable: bool = True) -> None:
        self.words = words
        self.killable = killable
        self.opened = self.ended = 0.0
        self.gone = asyncio.Event()

    async def open(self, on_event: Callable[[Event], None]) -> None:
        self.opened = asyncio.get_running_loop().time()
        self._talk = asyncio.create_task(self._say(on_event))

    async def _say(self, on_event: Callable[[Event], None]) -> None:
        for pause, word in self.words:
            await asyncio.sleep(pause)
            on_event(word)

    def send(self, command: Command) -> None:
        self.kill()

    async def closed(self) -> str:
        await self.gone.wait()
        return "it is gone"

    def kill(self) -> None:
        if self.killable and not self.gone.is_set():
            self.ended = asyncio.get_running_loop().time()
            self._talk.cancel()
            self.gone.set()


def _beats(count: int) -> list[tuple[float, Event]]:
    return [(0.5, Heartbeat(stats=EngineStats()))] * count


async def _keep(made: list[_Scripted]) -> EngineSupervisor:
    """A supervisor whose engines are these, one after another; the first one is loaded."""
    left = iter(made)
    subject = _supervisor(lambda: next(left))
    await subject.start(PATIENCE)
    return subject


def test_an_engine_that_hangs_is_replaced_within_the_stated_time(run: Callable[[Any], Any]) -> None:
    async def scenario() -> None:
        first, second = _Scripted([(1, READY), *_beats(100)]), _Scripted([(5, READY), *_beats(10_000)])
        subject = await _keep([first, second])
        await asyncio.sleep(100)
        assert subject.up.is_set()  # fifty seconds of heartbeats, and not yet sixty of silence
        assert subject.restarts == 0
        await asyncio.sleep(30)
        assert HANG <= first.ended - 51 <= HANG + 2
        assert subject.up.is_set()
        assert (subject.restarts, subject.trouble) == (1, None)
        await asyncio.sleep(1000)
        assert subject.restarts == 1  # an engine with nothing to do but beat does not hang
        await subject.close()

    run(scenario())


def test_engines_that_hang_one_after_another_are_started_after_ever_longer_pauses(run: Callable[[Any], Any]) -> None:
    async def scenario() -> None:
        made = [_Scripted([(1, READY)]) for _ in range(9)]
        subject = await _keep(made)
        await asyncio.sleep(700)
        pauses = [after.opened - before.ended for before, after in pairwise(made) if after.opened]
        assert len(pauses) >= 7
        assert all(later > 1.9 * earlier for earlier, later in pairwise(pauses))
        await subject.close()

    run(scenario())


def test_an_engine_that_hangs_while_it_loads_again_is_replaced(run: Callable[[Any], Any]) -> None:
    async def scenario() -> None:
        loading = _Scripted([(200, _kernels(1)), (200, _kernels(2))])
        made = [_Scripted([(1, READY)]), loading, _Scripted([(1, READY), *_beats(10_000)])]
        subject = await _keep(made)
        await asyncio.sleep(600)
        assert not subject.up.is_set()
        assert subject.trouble is None  # it got on until not long ago
        await asyncio.sleep(200)
        assert 700 <= loading.ended - loading.opened <= 710
        assert subject.up.is_set()
        assert subject.trouble is None
        await subject.close()

    run(scenario())


def test_only_what_a_restart_would_help_is_trouble(run: Callable[[Any], Any]) -> None:
    async def unkillable() -> None:
        stuck = _Scripted([(1, READY)], killable=False)
        subject = await _keep([stuck, _Scripted([(1, READY), *_beats(10_000)])])
        assert subject.trouble is None
        await asyncio.sleep(HANG + 5)
        assert not subject.up.is_set()  # nobody waits for it
        assert subject.trouble == "engine hangs"
        stuck.killable = True
        stuck.kill()
        await asyncio.sleep(5)
        assert subject.up.is_set()
        assert subject.trouble is None
        await subject.close()

    async def failing() -> None:
        class Failing(_Scripted):
            async def closed(self) -> str:
                await asyncio.sleep(1)
                return "exit status 1"

        engines = itertools.chain([_Scripted([(1, READY)])], iter(Failing, None))
        subject = _supervisor(lambda: next(engines))
        await subject.start(PATIENCE)
        await asyncio.sleep(HANG + PATIENCE - 10)
        assert subject.restarts > 5
        assert subject.trouble is None
        await asyncio.sleep(20)
        assert subject.trouble == "engine does not come back"
        await subject.close()

    run(unkillable())
    run(failing())


def test_a_service_that_stood_still_itself_does_not_blame_the_engine(run: Callable[[Any], Any], clock: Clock) -> None:
    async def scenario() -> None:
        subject = await _keep([_Scripted([(1, READY), *_beats(10_000)])])
        await asyncio.sleep(10)
        for _ in range(3):
            clock.now += 1000  # as after SIGSTOP and SIGCONT: what the engine said meanwhile is read afterwards
            await asyncio.sleep(1)
        assert subject.restarts == 0
        assert subject.up.is_set()
        await subject.close()

    run(scenario())
