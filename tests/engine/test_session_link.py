"""A session over the socket: commands to a real child process, answers as events, and a child that is killed."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from tenora.config import Settings
from tenora.engine.client.child import ProcessLink
from tenora.engine.client.client import AsyncEngine
from tenora.engine.clients import OWNER, Clients
from tenora.engine.messages import PutCommand, StartSession, Training
from tenora.errors import InvalidRequestError, NotFoundError, UnavailableError
from tenora.training.commands import (
    AdamWSettings,
    ForwardBackward,
    Losses,
    OptimStep,
    Refused,
    Row,
    Sample,
    Sampled,
    Saved,
    SaveState,
    SessionReady,
    Stepped,
)
from tenora.training.events import TrainEvent
from tenora.training.spec import LoraSpec, SessionSpec
from tests.engine.requests import sampling
from tests.support.patience import PATIENCE
from tests.support.scripted_engine import Script, ScriptedEngine

SETTINGS = Settings(
    threads=1, dtype="float32", device="cpu", kv_cache_bytes=2**20, adapter_pool_bytes=2**20, log_level="warning"
)
ROWS = [Row([7, 8, 9, 10], [None, 0.5, -0.25, 0.0]), Row([5, 6], [None, 1.0])]
LEARN = ForwardBackward(command_id=1, rows=ROWS)
STEP = OptimStep(command_id=2, settings=AdamWSettings(learning_rate=1e-2))


def make_spec(directory: Path) -> SessionSpec:
    return SessionSpec(
        run_id="session",
        share_group="tenant",
        workdir=str(directory / "work"),
        base_model="tiny",
        lora=LoraSpec(rank=4),
    )


async def take(events: AsyncGenerator[TrainEvent, None]) -> Any:
    return await asyncio.wait_for(anext(events), PATIENCE)


async def test_a_session_goes_on_from_its_saved_state_when_the_engine_was_killed(
    tiny_base: Path, tmp_path: Path
) -> None:
    engine = AsyncEngine(SETTINGS, tiny_base)
    await engine.start()
    try:
        events = engine.train(make_spec(tmp_path))
        assert await take(events) == SessionReady(run_id="session", step=0)
        for command in (LEARN, STEP, SaveState(command_id=3, name="one"), LEARN, STEP):
            await engine.put("session", command)
        first, *_, last = answers = [await take(events) for _ in range(5)]
        assert [type(answer) for answer in answers] == [Losses, Stepped, Saved, Losses, Stepped]
        assert [len(row) for row in first.losses] == [3, 1]
        assert first.total == pytest.approx(0.5 * first.losses[0][0] - 0.25 * first.losses[0][1] + first.losses[1][0])
        assert last.step == 2
        await engine.put("session", Sample(command_id=4, prompts=[[5, 6]], sampling=sampling(max_tokens=3)))
        sampled = await take(events)
        assert isinstance(sampled, Sampled)
        assert len(sampled.sequences[0].token_ids) == 3

        assert isinstance(engine._supervisor.link, ProcessLink)  # type: ignore[union-attr]
        os.kill(engine._supervisor.link.pid, signal.SIGKILL)  # type: ignore[union-attr]
        with pytest.raises(UnavailableError):
            await take(events)
        await asyncio.wait_for(engine.wait_alive(), PATIENCE)
        again = engine.train(make_spec(tmp_path))
        assert await take(again) == SessionReady(run_id="session", step=1), "as it was saved"
        for command in (LEARN, STEP):
            await engine.put("session", command)
        assert [await take(again), await take(again)] == answers[3:], "the same losses, the same gradient"
        await again.aclose()
        with pytest.raises(InvalidRequestError):
            await engine.put("session", ForwardBackward(command_id=1, rows=[Row([2**70], [None])]))
        with pytest.raises(NotFoundError):
            await engine.put("another", LEARN)
    finally:
        await engine.close(1)


def test_a_client_commands_no_run_of_another() -> None:
    engine = ScriptedEngine(Script.counting(), lambda: None)
    clients = Clients(engine)
    clients.joined("guest")
    spec = SessionSpec(run_id="session", share_group="", workdir="", base_model="")
    assert clients.take(OWNER, StartSession(spec)) == []
    ((hears, event),) = clients.take("guest", PutCommand("session", LEARN))
    assert hears == "guest"
    assert isinstance(event, Training)
    assert isinstance(event.event, Refused)
    assert event.event.code == "unknown_run"
    assert clients.take(OWNER, PutCommand("session", LEARN)) == []
