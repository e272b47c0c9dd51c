"""What a living process is at, another that starts beside it leaves alone."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select, update

from tenora.config import Settings
from tenora.control.registry.database import Database
from tenora.control.registry.presence import Presence
from tenora.control.registry.tables import ProcessRow
from tenora.control.tenancy.idempotency import Idempotency
from tenora.errors import ConflictError
from tests.control.conftest import OpenControl, tenant

STARTED = 1000.0  # seconds before now


@pytest.fixture
async def database(home: Path, registry_url: str | None) -> AsyncIterator[Database]:
    await asyncio.to_thread(home.mkdir)
    opened = await Database.open(Settings(home=home, database_url=registry_url).database)
    yield opened
    await opened.close()


@pytest.fixture
async def other(database: Database) -> Presence:
    """Another process, alive, that has run for a while."""
    presence = Presence(database, "there")
    presence._started = int(time.time() - STARTED)
    await presence.begin()
    await live(database, until=2**40)
    return presence


async def live(database: Database, *, until: int) -> None:
    async with database.write() as session:
        await session.execute(update(ProcessRow).values(alive_until=until))


async def die(database: Database) -> None:
    await live(database, until=1)


def left_in_staging(home: Path, age: float) -> Path:
    path = home / "staging" / f"half-{age:g}"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"half")
    os.utime(path, (time.time() - age, time.time() - age))
    return path


@pytest.mark.parametrize("alive", [True, False])
async def test_files_that_a_living_process_is_writing_are_not_swept(
    database: Database, other: Presence, open_control: OpenControl, home: Path, alive: bool
) -> None:
    of_others, of_nobody = left_in_staging(home, STARTED / 2), left_in_staging(home, STARTED * 2)
    if not alive:
        await die(database)
    await open_control()
    assert await asyncio.to_thread(of_others.exists) is alive
    assert not await asyncio.to_thread(of_nobody.exists)


@pytest.mark.parametrize("alive", [True, False])
async def test_a_request_that_a_living_process_is_at_stays_reserved(
    database: Database, other: Presence, open_control: OpenControl, alive: bool
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    assert await Idempotency(database, other).begin(acme, "files", "key", b"payload") is None
    if not alive:
        await die(database)
    await control.close()
    control = await open_control()
    if alive:
        with pytest.raises(ConflictError):
            await control.idempotency.begin(acme, "files", "key", b"payload")
    else:
        assert await control.idempotency.begin(acme, "files", "key", b"payload") is None


async def test_a_process_that_was_taken_for_dead_is_alive_again_with_its_next_heartbeat(
    database: Database, other: Presence
) -> None:
    await Presence(database, "there").begin()  # takes its seat
    await other.beat()
    async with database.read() as session:
        assert other.id in set(await session.scalars(select(ProcessRow.id)))
    assert await Presence(database, "elsewhere").oldest_start() < time.time() - STARTED / 2


async def test_a_process_that_ends_is_gone_at_once(database: Database, other: Presence) -> None:
    await other.end()
    async with database.read() as session:
        assert list(await session.scalars(select(ProcessRow.id))) == []
