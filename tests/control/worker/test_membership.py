"""What the dead leave is swept by the living as they go, not only when somebody starts."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from sqlalchemy import select, update

from tenora.control.adapters.blobs import Blobs
from tenora.control.control import Control
from tenora.control.registry.presence import Presence
from tenora.control.registry.tables import JobRow, ProcessRow
from tenora.control.tenancy.idempotency import Idempotency
from tenora.control.tenancy.records import Principal
from tenora.control.worker import membership
from tenora.errors import StorageFullError
from tests.control.conftest import OpenControl, create_job
from tests.support.patience import PATIENCE


@pytest.fixture(autouse=True)
def _sweeps_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "SWEEP_SECONDS", 0.02)


async def come_true(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await condition():  # noqa: ASYNC110  # the state of a database
            await asyncio.sleep(0.01)


async def died(control: Control, seat: str, ago: int) -> Presence:
    """Another process that gave its last heartbeat so long ago, in seconds."""
    other = Presence(control._registry.database, seat)
    await other.begin()
    async with control._registry.database.write() as session:
        row = update(ProcessRow).where(ProcessRow.id == other.id)
        await session.execute(row.values(alive_until=ProcessRow.alive_until - ago))
    return other


async def test_the_leases_and_reservations_of_a_process_that_died_are_ended(control: Control, acme: Principal) -> None:
    database = control._registry.database
    other = await died(control, "worker-elsewhere", 0)
    job = await create_job(control, acme)
    await control.jobs.pause(acme, job.id)
    async with database.write() as session:
        lease = update(JobRow).where(JobRow.id == job.id)
        await session.execute(lease.values(lease_owner=other.id, lease_expires_at=2**40))
    assert await Idempotency(database, other).begin(acme, "files", "key", b"payload") is None
    async with database.write() as session:
        await session.execute(update(ProcessRow).where(ProcessRow.id == other.id).values(alive_until=1))

    async def swept() -> bool:
        async with database.read() as session:
            return await session.scalar(select(JobRow.lease_owner).where(JobRow.id == job.id)) is None

    await come_true(swept)

    async def forgotten() -> bool:
        async with database.read() as session:
            return await session.scalar(select(ProcessRow.id).where(ProcessRow.id == other.id)) is None

    await come_true(forgotten)  # the last chore of a round
    assert await control.idempotency.begin(acme, "files", "key", b"payload") is None


async def test_who_died_long_ago_is_forgotten_and_who_died_lately_is_not(control: Control) -> None:
    lately, long_ago = await died(control, "a", 3600), await died(control, "b", 48 * 3600)

    async def left() -> set[str]:
        async with control._registry.database.read() as session:
            return set(await session.scalars(select(ProcessRow.id)))

    async def forgotten() -> bool:
        return long_ago.id not in await left()

    await come_true(forgotten)
    assert lately.id in await left()


async def test_a_chore_that_fails_keeps_no_other_from_being_done(
    open_control: OpenControl, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = 0

    async def full(self: Blobs) -> None:
        nonlocal failed
        failed += 1
        raise StorageFullError("no room")

    monkeypatch.setattr(Blobs, "release_postponed", full)
    control = await open_control()
    long_ago = await died(control, "b", 48 * 3600)

    async def forgotten() -> bool:
        async with control._registry.database.read() as session:
            return await session.scalar(select(ProcessRow.id).where(ProcessRow.id == long_ago.id)) is None

    await come_true(forgotten)
    assert failed
    assert "trying again later" in caplog.text
