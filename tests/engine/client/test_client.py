from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from functools import partial
from operator import eq
from pathlib import Path

import pytest

from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine.client import client, supervisor
from tenora.engine.client.client import AsyncEngine
from tenora.engine.messages import EvictAdapter, Generate, PinAdapter
from tenora.errors import (
    AdapterDamagedError,
    AdapterFormatError,
    ConflictError,
    ContextLengthError,
    InvalidRequestError,
    RateLimitedError,
    TenoraError,
    UnavailableError,
    UnsupportedModelError,
)
from tenora.training.events import StepEvent, StoppedEvent
from tenora.training.spec import TrainSpec
from tests.engine.requests import generate, sampling
from tests.support.hanging import impatient
from tests.support.patience import PATIENCE
from tests.support.scripted_engine import CRASH, FAIL, READY, SILENT, Script, ScriptedEngine


class Fakes:
    """Builds scripted engines and keeps them for inspection."""

    def __init__(self) -> None:
        self.made: list[ScriptedEngine] = []
        self.error: Exception | None = None

    def __call__(self, wake: Callable[[], None]) -> ScriptedEngine:
        if self.error is not None:
            raise self.error
        self.made.append(ScriptedEngine(Script.counting(), wake))
        return self.made[-1]


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    monkeypatch.setattr(supervisor, "BACKOFF_SECONDS", (0.01, 0.05))
    return Fakes()


@pytest.fixture
async def engine(fakes: Fakes) -> AsyncIterator[AsyncEngine]:
    engine = AsyncEngine.in_thread(Settings(max_queued_requests=4), fakes)
    await engine.start()
    yield engine
    await engine.close(0)


async def tokens_of(engine: AsyncEngine, request: Generate) -> list[int]:
    return [token async for output in engine.generate(request) for token in output.token_ids]


async def until(condition: Callable[[], bool]) -> None:
    """Wait for something that no event announces to the test."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # the state of a thread
            await asyncio.sleep(0.005)


def spec(run_id: str) -> TrainSpec:
    return TrainSpec(run_id=run_id, share_group="", tasks=(), workdir="", base_model="")


async def test_requests_run_side_by_side(engine: AsyncEngine) -> None:
    assert engine.ready == READY
    assert engine.healthy
    lists = await asyncio.gather(
        *(tokens_of(engine, generate([start], sampling(max_tokens=5))) for start in (10, 20, 30))
    )
    assert lists == [[11, 12, 13, 14, 15], [21, 22, 23, 24, 25], [31, 32, 33, 34, 35]]


async def test_closing_the_iterator_aborts(engine: AsyncEngine, fakes: Fakes) -> None:
    request = generate([1], sampling(max_tokens=10**9))
    async with aclosing(engine.generate(request)) as outputs:
        async for _ in outputs:
            break
    await until(lambda: fakes.made[0].script.aborted == [request.request_id])
    assert engine.queued == 0


async def test_cancelling_the_consumer_aborts(engine: AsyncEngine, fakes: Fakes) -> None:
    request = generate([SILENT])
    task = asyncio.create_task(tokens_of(engine, request))
    await until(lambda: engine.queued == 1)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    await until(lambda: fakes.made[0].script.aborted == [request.request_id])


async def test_a_finished_request_is_not_aborted(engine: AsyncEngine, fakes: Fakes) -> None:
    await tokens_of(engine, generate([1], sampling(max_tokens=2)))
    await tokens_of(engine, generate([1], sampling(max_tokens=2)))
    assert fakes.made[0].script.aborted == []


async def test_too_many_waiting_requests_are_turned_away(engine: AsyncEngine) -> None:
    tasks = [asyncio.create_task(tokens_of(engine, generate([SILENT]))) for _ in range(4)]
    await until(lambda: engine.queued == 4)
    with pytest.raises(RateLimitedError) as caught:
        await tokens_of(engine, generate([1]))
    assert caught.value.code == "queue_full"
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert await tokens_of(engine, generate([1], sampling(max_tokens=1))) == [2]


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("adapter_unavailable", UnavailableError),
        ("out_of_memory", UnavailableError),
        ("engine_error", UnavailableError),
        ("adapter_damaged", AdapterDamagedError),
        ("adapter_overflow", AdapterFormatError),
        ("adapter_too_large", AdapterFormatError),
        ("invalid_adapter", AdapterFormatError),
        ("adapters_pinned", ConflictError),
        ("invalid_request", InvalidRequestError),
        ("context_length_exceeded", ContextLengthError),
    ],
)
async def test_failures_of_the_engine_become_errors(engine: AsyncEngine, code: str, kind: type[TenoraError]) -> None:
    with pytest.raises(kind) as caught:
        await tokens_of(engine, generate([FAIL], share_group=code))
    assert caught.value.code == (code if code != "invalid_request" else "invalid_value")


async def test_values_that_cannot_cross_the_line_fail_their_own_request(engine: AsyncEngine) -> None:
    for bad in (
        generate([1], sampling(seed=2**70)),
        generate([1], sampling(max_tokens=1.5)),  # type: ignore[arg-type]  # that is the point
        generate([1], sampling(logit_bias={"x": 1.0})),
    ):
        with pytest.raises(InvalidRequestError):
            await tokens_of(engine, bad)
    assert engine.queued == 0
    assert await tokens_of(engine, generate([1], sampling(max_tokens=1))) == [2]
    assert engine.restarts == 0


async def test_a_dead_engine_fails_what_is_open_and_comes_back(engine: AsyncEngine, fakes: Fakes) -> None:
    ref = AdapterRef(digest="d", path="/p")
    await engine.pin(ref)
    waiting = asyncio.create_task(tokens_of(engine, generate([SILENT])))
    training = asyncio.create_task(_events(engine, "run"))
    await until(lambda: bool(fakes.made[0].runs))
    with pytest.raises(UnavailableError) as caught:
        await tokens_of(engine, generate([CRASH]))
    assert caught.value.code == "engine_lost"
    with pytest.raises(UnavailableError):
        await waiting
    with pytest.raises(UnavailableError):
        await training
    await engine.wait_alive()
    assert engine.healthy
    assert engine.restarts == 1
    assert await tokens_of(engine, generate([1], sampling(max_tokens=1))) == [2]
    assert fakes.made[1].script.pins == [(ref, True)]


async def test_while_it_restarts_requests_are_refused_at_once(engine: AsyncEngine, fakes: Fakes) -> None:
    fakes.error = OSError("not yet")
    with pytest.raises(UnavailableError):
        await tokens_of(engine, generate([CRASH]))
    await until(lambda: not engine.alive)
    with pytest.raises(UnavailableError, match="starting"):
        await tokens_of(engine, generate([1]))
    await until(lambda: engine.restarts >= 2)  # it goes on trying
    fakes.error = None
    await until(lambda: engine.healthy)


async def test_a_start_that_fails_says_why(fakes: Fakes) -> None:
    fakes.error = UnsupportedModelError("no such family")
    engine = AsyncEngine.in_thread(Settings(), fakes)
    with pytest.raises(UnsupportedModelError, match="no such family"):
        await engine.start()
    fakes.error = RuntimeError("boom")
    with pytest.raises(UnavailableError, match="boom"):
        await AsyncEngine.in_thread(Settings(), fakes).start()


async def test_nobody_waits_for_a_loop_that_hangs(fakes: Fakes) -> None:
    engine = AsyncEngine.in_thread(Settings(), fakes)
    await engine.start()
    waiting = asyncio.create_task(tokens_of(engine, generate([SILENT])))
    training = asyncio.create_task(_events(engine, "run"))
    await until(lambda: bool(fakes.made[-1].runs))
    hanging = fakes.made[-1].script
    hanging.hang.set()
    with impatient(engine), pytest.raises(UnavailableError) as caught:
        await waiting
    assert caught.value.code == "engine_lost"
    with pytest.raises(UnavailableError):
        await training
    with pytest.raises(UnavailableError, match="starting"):
        await tokens_of(engine, generate([1]))
    assert engine.trouble == "engine hangs"  # a thread cannot be killed
    hanging.released.set()
    await until(lambda: engine.healthy)
    assert engine.trouble is None
    assert engine.restarts >= 1
    assert await tokens_of(engine, generate([1], sampling(max_tokens=1))) == [2]
    await engine.close(0)


async def test_a_reader_that_stops_reading_is_cut_off(
    engine: AsyncEngine, fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "OUTPUT_BUFFER", 16)
    request = generate([1], sampling(max_tokens=10**9))
    outputs = engine.generate(request)
    assert (await anext(outputs)).token_ids[0] == 2
    await until(lambda: fakes.made[0].script.aborted == [request.request_id])
    assert await tokens_of(engine, generate([5], sampling(max_tokens=2))) == [6, 7]
    with pytest.raises(UnavailableError) as caught:
        async for _ in outputs:
            pass
    assert caught.value.code == "slow_reader"


async def _events(engine: AsyncEngine, run_id: str) -> list[object]:
    return [event async for event in engine.train(spec(run_id))]


async def test_training_is_followed_to_its_end(engine: AsyncEngine) -> None:
    task = asyncio.create_task(_events(engine, "run"))
    await until(lambda: engine.stats.training_runs == 1)
    await engine.stop_training("run", pause=False)
    events = await task
    assert isinstance(events[0], StepEvent)
    assert isinstance(events[-1], StoppedEvent)
    assert not events[-1].paused


async def test_leaving_a_run_pauses_it_and_it_can_be_taken_up_again(engine: AsyncEngine, fakes: Fakes) -> None:
    for expected in ([("run", True)], [("run", True)] * 2):
        async with aclosing(engine.train(spec("run"))) as events:
            first = await anext(events)
            assert isinstance(first, StepEvent)
            assert first.step == 1  # not the StoppedEvent of the time before
        await until(partial(eq, fakes.made[0].script.stopped, expected))


async def test_what_another_client_pins_is_pinned_again_at_the_engines_successor(
    engine: AsyncEngine, fakes: Fakes
) -> None:
    mine, others = (AdapterRef(digest=letter * 64, path=f"/{letter}") for letter in "ab")
    await engine.pin(mine)
    fakes.made[0].pending += [PinAdapter(others), EvictAdapter(mine.digest)]
    fakes.made[0].wake()
    assert await tokens_of(engine, generate([5], sampling(max_tokens=2))) == [6, 7]
    with pytest.raises(UnavailableError):
        await tokens_of(engine, generate([CRASH]))
    await until(lambda: engine.alive and len(fakes.made) > 1 and bool(fakes.made[1].script.pins))
    assert fakes.made[1].script.pins == [(others, True)]


async def test_close_lets_requests_finish_within_the_grace(fakes: Fakes) -> None:
    engine = AsyncEngine.in_thread(Settings(), fakes)
    await engine.start()
    slow = asyncio.create_task(tokens_of(engine, generate([1], sampling(max_tokens=client.OUTPUT_BUFFER))))
    await asyncio.sleep(0)  # it has been asked for
    await engine.close(PATIENCE)
    assert len(await slow) == client.OUTPUT_BUFFER


async def test_what_outlasts_the_grace_ends_with_an_error_and_runs_are_paused(fakes: Fakes) -> None:
    engine = AsyncEngine.in_thread(Settings(), fakes)
    await engine.start()
    endless = asyncio.create_task(tokens_of(engine, generate([SILENT])))
    training = asyncio.create_task(_events(engine, "run"))
    await until(lambda: bool(fakes.made[0].runs))
    await engine.close(0.05)
    with pytest.raises(UnavailableError):
        await endless
    last = (await training)[-1]
    assert isinstance(last, StoppedEvent)
    assert last.paused
    with pytest.raises(UnavailableError):
        await tokens_of(engine, generate([1]))
    await engine.close(1.0)  # a second time is fine


async def test_before_start_there_is_no_engine(tmp_path: Path) -> None:
    engine = AsyncEngine(Settings(), tmp_path)
    assert not engine.healthy
    with pytest.raises(UnavailableError):
        _ = engine.ready
    with pytest.raises(UnavailableError):
        await tokens_of(engine, generate([1]))
