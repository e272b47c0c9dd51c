"""Whose job is claimed next, and that no two workers have one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest
from sqlalchemy import select, update

from tenora.config import Settings
from tenora.control.jobs.lease_rows import Claim, LeaseLostError, owned
from tenora.control.jobs.leases import Leases
from tenora.control.registry.database import Database, RegistryBusyError
from tenora.control.registry.ids import new_id
from tenora.control.registry.presence import Presence
from tenora.control.registry.tables import JobEventRow, JobRow, JobStatus, ProcessRow, TenantRow


@pytest.fixture
async def settings(home: Path, registry_url: str | None) -> Settings:
    await asyncio.to_thread(home.mkdir)
    return Settings(home=home, database_url=registry_url)


@pytest.fixture
async def database(settings: Settings) -> AsyncIterator[Database]:
    opened = await Database.open(settings.database)
    yield opened
    await opened.close()


async def worker(database: Database, seat: str = "here") -> Leases:
    presence = Presence(database, seat)
    await presence.begin()
    return Leases(database, presence)


async def add_tenant(database: Database, name: str, *, weight: float = 1.0) -> str:
    row = TenantRow(id=new_id("tenant"), name=name, created_at=1, weight=weight)
    async with database.write() as session:
        session.add(row)
    return row.id


async def add_jobs(database: Database, tenant_id: str, count: int, status: JobStatus = "queued") -> list[str]:
    rows = [
        JobRow(
            id=new_id("ftjob"),
            tenant_id=tenant_id,
            model="tiny",
            status=status,
            training_file="file-x",
            requested={},
            hyperparameters={},
            lora={},
            settings={},
            name="desk",
            seed=0,
            created_at=1,
            result_files=[],
            attempts=0,
            lease_token=0,
        )
        for _ in range(count)
    ]
    async with database.write() as session:
        for row in rows:
            session.add(row)
            await session.flush()  # keeps their order
    return [row.id for row in rows]


async def end(database: Database, claim: Claim) -> None:
    async with database.write() as session:
        row = await owned(session, claim)
        row.status = "succeeded"
        row.lease_owner, row.lease_expires_at, row.lease_token = None, None, row.lease_token + 1


async def owners(database: Database) -> dict[str, str | None]:
    async with database.read() as session:
        return {row.id: row.lease_owner for row in await session.scalars(select(JobRow))}


@pytest.mark.parametrize("at_once", [1, 4])
@pytest.mark.parametrize(("task", "status"), [("train", "queued"), ("prepare", "validating_files")])
async def test_no_tenant_waits_behind_the_backlog_of_another(
    database: Database, task: str, status: JobStatus, at_once: int
) -> None:
    big, small = await add_tenant(database, "big"), await add_tenant(database, "small")
    backlog = await add_jobs(database, big, 40, status)
    (one,) = await add_jobs(database, small, 1, status)
    leases = await worker(database)
    order: list[Claim] = []
    for number in range(6):
        claim = await leases.claim(task, [])  # type: ignore[arg-type]
        assert claim is not None
        order.append(claim)
        if number >= at_once - 1:
            await end(database, order[number - at_once + 1])
    assert [claim.job_id for claim in order].index(one) <= 1
    assert [claim.job_id for claim in order if claim.tenant_id == big] == backlog[:5]


async def test_a_tenant_of_twice_the_weight_has_twice_the_jobs_in_hand(database: Database) -> None:
    one, two = await add_tenant(database, "one"), await add_tenant(database, "two", weight=2.0)
    for tenant_id in (one, two):
        await add_jobs(database, tenant_id, 12)
    leases = await worker(database)
    claimed = [await leases.claim("train", []) for _ in range(12)]
    assert sum(claim is not None and claim.tenant_id == two for claim in claimed) == 8


async def test_one_tenant_has_one_job_prepared_at_a_time(database: Database) -> None:
    one, two = await add_tenant(database, "one"), await add_tenant(database, "two")
    first, second = await add_jobs(database, one, 2, "validating_files")
    (other,) = await add_jobs(database, two, 1, "validating_files")
    leases = await worker(database)

    async def claim() -> Claim | None:
        return await leases.claim("prepare", [], most_of_tenant=1)

    claims = [await claim() for _ in range(3)]
    assert [None if one is None else one.job_id for one in claims] == [first, other, None]
    assert claims[0] is not None
    await end(database, claims[0])
    again = await claim()
    assert again is not None
    assert again.job_id == second


async def test_no_job_is_claimed_twice_by_workers_that_claim_at_once(database: Database, settings: Settings) -> None:
    tenants: Sequence[str] = [await add_tenant(database, name) for name in ("one", "two", "three")]
    other = await Database.open(settings.database)
    try:
        workers = [await worker(database, "a"), await worker(other, "b")]
        for _ in range(20):
            jobs = [(await add_jobs(database, tenant_id, 1))[0] for tenant_id in tenants]
            claims = await asyncio.gather(*(one.claim("train", []) for one in workers for _ in jobs))
            claimed = [claim.job_id for claim in claims if claim is not None]
            while (left := await workers[0].claim("train", [])) is not None:  # a worker may have met only locked rows
                claimed.append(left.job_id)
            assert sorted(claimed) == sorted(jobs)
    finally:
        await other.close()


async def test_a_worker_that_starts_beside_a_living_one_ends_no_lease(database: Database) -> None:
    await add_jobs(database, await add_tenant(database, "acme"), 3)
    alive = await worker(database, "there")
    claims = [await alive.claim("train", []) for _ in range(3)]
    before = await owners(database)
    assert await (await worker(database, "here")).end_dead() == 0
    assert await owners(database) == before
    for claim in claims:
        assert claim is not None
        async with database.write() as session:
            assert (await owned(session, claim)).id == claim.job_id


@pytest.mark.parametrize("how", ["its heartbeat is past", "its seat was taken"])
async def test_the_leases_of_a_dead_worker_end_when_another_starts(database: Database, how: str) -> None:
    await add_jobs(database, await add_tenant(database, "acme"), 2)
    dead = await worker(database, "there")
    claim = await dead.claim("train", [])
    assert claim is not None
    if how == "its heartbeat is past":
        async with database.write() as session:
            await session.execute(update(ProcessRow).values(alive_until=1))
        new = await worker(database, "here")
    else:
        new = await worker(database, "there")
    assert await new.end_dead() == 1
    taken = await new.claim("train", [])
    assert taken is not None
    assert (taken.job_id, taken.token > claim.token) == (claim.job_id, True)
    async with database.write() as session:
        with pytest.raises(LeaseLostError):
            await owned(session, claim)


@pytest.mark.parametrize("gracefully", [False, True])
async def test_a_job_that_was_paused_when_its_worker_ended_says_so_once(database: Database, gracefully: bool) -> None:
    tenant = await add_tenant(database, "acme")
    await add_jobs(database, tenant, 2, "running")
    old = await worker(database)
    claims = [await old.claim("train", []) for _ in range(2)]
    paused, running = (claim.job_id for claim in claims if claim is not None)
    async with database.write() as session:
        await session.execute(update(JobRow).where(JobRow.id == paused).values(status="paused"))
    if gracefully:
        await old.end()
    new = await worker(database)  # in the same seat
    assert await new.end_dead() == (0 if gracefully else 2)
    assert await new.end_dead() == 0
    async with database.read() as session:
        said = await session.execute(select(JobEventRow.job_id, JobEventRow.message))
    assert [tuple(line) for line in said] == [(paused, "The job was paused")]
    assert running != paused


async def test_only_leases_that_are_held_are_renewed(database: Database) -> None:
    await add_jobs(database, await add_tenant(database, "acme"), 2)
    leases = await worker(database)
    lost, kept = await leases.claim("train", []), await leases.claim("train", [])
    assert lost is not None
    assert kept is not None
    async with database.write() as session:
        await session.execute(update(JobRow).values(lease_expires_at=1))
        await session.execute(update(JobRow).where(JobRow.id == lost.job_id).values(lease_token=99))
    await leases.renew([lost, kept])
    async with database.read() as session:
        expires = {row.id: row.lease_expires_at for row in await session.scalars(select(JobRow))}
    assert expires[lost.job_id] == 1
    assert (expires[kept.job_id] or 0) > 1


async def test_the_token_stands_in_every_write_of_a_job(database: Database) -> None:
    """A row that was read before it changed hands cannot be written by whoever read it."""
    await add_jobs(database, await add_tenant(database, "acme"), 1)
    leases = await worker(database)
    claim = await leases.claim("train", [])
    assert claim is not None
    async with database.read() as session:
        row = (await session.scalars(select(JobRow))).one()
    async with database.write() as session:
        await session.execute(update(JobRow).values(lease_token=JobRow.lease_token + 1))

    async def write_late() -> None:
        async with database.write() as session:
            session.add(row)
            row.status = "failed"

    with pytest.raises(RegistryBusyError):
        await write_late()
    async with database.read() as session:
        assert (await session.scalars(select(JobRow.status))).one() == "queued"
