"""Events of a run are written together, at most a second after they came, in order and none lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import event as sqlalchemy_event

from tenora.control.control import Control
from tenora.control.jobs import rows as job_rows
from tenora.control.tenancy.records import Principal
from tenora.control.worker.batches import batches
from tests.control.conftest import create_job, messages, until
from tests.support.patience import PATIENCE
from tests.support.scripted_jobs import JobScript


class Source:
    """Items that come when they are put; an exception is raised, None ends."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[Any]:
        try:
            while (item := await self.queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.closed = True


def small(item: int) -> bool:
    return item < 100


async def test_items_that_wait_are_told_together_and_others_alone() -> None:
    source = Source()
    for item in (1, 2, 300, 400, 3, None):
        source.queue.put_nowait(item)
    told = [batch async for batch in batches(aiter(source), small, PATIENCE)]
    assert told == [[1, 2], [300], [400], [3]]


async def test_what_has_come_is_told_in_time_though_nothing_follows() -> None:
    source = Source()
    stream = batches(aiter(source), small, 0.01)
    source.queue.put_nowait(1)
    async with asyncio.timeout(PATIENCE):
        assert await anext(stream) == [1]
    source.queue.put_nowait(2)
    async with asyncio.timeout(PATIENCE):
        assert await anext(stream) == [2]
    await stream.aclose()
    assert source.closed


async def test_what_came_before_an_error_is_told_before_it() -> None:
    source = Source()
    for item in (1, 2, ValueError("died")):
        source.queue.put_nowait(item)
    stream = batches(aiter(source), small, PATIENCE)
    assert await anext(stream) == [1, 2]
    with pytest.raises(ValueError, match="died"):
        await anext(stream)


async def test_a_step_costs_no_transaction_of_its_own(
    control: Control, acme: Principal, script: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tenora.control.worker.training.BATCH_SECONDS", PATIENCE)
    commits = 0

    def count(*_: Any) -> None:
        nonlocal commits
        commits += 1

    script.steps, script.hold_at = 40, 1
    job = await create_job(control, acme)
    async with asyncio.timeout(PATIENCE):
        await script.until_held()
    sqlalchemy_event.listen(control._registry.database._write.sync_engine, "commit", count)
    script.go_on()
    await until(control, acme, job.id)
    steps = [line for line in await messages(control, acme, job.id) if "training loss" in line]
    assert len(steps) > 30
    assert [line.partition("/")[0] for line in steps] == [f"Step {n + 1}" for n in range(len(steps))]
    assert commits < len(steps)


async def test_the_lines_of_steps_are_bounded_and_the_newest_stay(
    control: Control, acme: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_rows, "KEPT_STEPS", 20)
    monkeypatch.setattr(job_rows, "_THINNED_EVERY", 5)
    job = await create_job(control, acme)
    await until(control, acme, job.id)
    before = [line for line in await messages(control, acme, job.id) if "training loss" not in line]
    total = 100
    async with control._registry.database.write() as session:
        row = await job_rows.find_job(session, acme.tenant_id, job.id)
        for first in range(1, total, 2):
            for step in (first, first + 1):
                job_rows.log(session, row, f"Long {step}", metrics={"step": step, "train_loss": 1.0})
                job_rows.log(session, row, f"Evaluated {step}", metrics={"step": step, "valid_loss": 1.0})
                await session.flush()
            await job_rows.thin_steps(session, row, first, first + 1, total)
    said = await messages(control, acme, job.id)
    kept = [int(line.removeprefix("Long ")) for line in said if line.startswith("Long ")]
    assert kept == [*range(5, 80, 5), *range(80, total + 1)]
    assert len([line for line in said if line.startswith("Evaluated ")]) == total
    assert said[: len(before)] == before


async def test_a_line_says_what_was_known_when_its_event_came(control: Control, acme: Principal) -> None:
    """Lines that are written together are those that would have been written one by one."""
    job = await create_job(control, acme)
    await until(control, acme, job.id, "succeeded")
    events = (await control.jobs.events(acme, job.id, limit=1000)).items
    lines = [event.data for event in reversed(events) if "full_valid_loss" in event.data]
    total = lines[-1]["step"]
    assert [(line["step"], line["total_steps"]) for line in lines] == [(0, None), (total, total)]
