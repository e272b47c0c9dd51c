"""What the registry takes: `python -m tests.bench.host.registry [--postgres]`.

Claims of a job from a queue, beside a claim as a read and then a write; and lines of a run one a transaction, beside as
many as a second brings. Wall-clock medians: what counts is the round trip and the disk's sync.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from sqlalchemy import or_, select

from tenora.control.jobs import rows
from tenora.control.jobs.lease_rows import Claim, owned
from tenora.control.jobs.leases import Leases
from tenora.control.registry.database import Database
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.presence import Presence
from tenora.control.registry.tables import JobRow, TenantRow
from tests.support.postgres import running

TENANTS, JOBS_EACH = 50, 20
CLAIMS, LINES, BATCH = 100, 200, 50  # a small run makes some fifty steps a second


async def fill(database: Database) -> None:
    """A queue of every tenant's."""
    for number in range(TENANTS):
        async with database.write() as session:
            tenant = TenantRow(id=new_id("tenant"), name=f"tenant-{number}", created_at=1)
            session.add(tenant)
            await session.flush()
            for _ in range(JOBS_EACH):
                row = JobRow(id=new_id("ftjob"), tenant_id=tenant.id, model="m", status="queued", training_file="f")
                row.requested = row.hyperparameters = row.lora = row.settings = {}
                row.name, row.seed, row.created_at, row.result_files = "n", 0, 1, []
                row.attempts = row.lease_token = 0
                session.add(row)


async def read_then_write(database: Database) -> None:
    """A claim in two statements, oldest job first, which is right only where nobody else writes meanwhile."""
    async with database.write() as session:
        free = or_(JobRow.lease_owner.is_(None), JobRow.lease_expires_at < unix_now())
        query = select(JobRow).where(JobRow.status.in_(("running", "queued")), free).order_by(JobRow.seq).limit(1)
        row = (await session.scalars(query)).one()
        row.lease_owner, row.lease_expires_at, row.lease_token = "bench", unix_now() + 30, row.lease_token + 1


async def write_lines(database: Database, claim: Claim, count: int) -> None:
    """As many steps in one transaction."""
    async with database.write(alone=False) as session:
        row = await owned(session, claim)
        for step in range(count):
            rows.log(session, row, f"Step {step}/1000: training loss=1.00", metrics={"step": step, "train_loss": 1.0})
            await session.flush()


async def seconds_of(action: Callable[[], Awaitable[object]], times: int) -> float:
    """Median wall-clock time of one."""
    taken = []
    for _ in range(times):
        begun = time.perf_counter()
        await action()
        taken.append(time.perf_counter() - begun)
    return statistics.median(taken)


async def measure(database: Database) -> None:
    """Print a line per measurement: before, after, ratio."""
    await fill(database)
    presence = Presence(database, "bench")
    await presence.begin()
    leases = Leases(database, presence)
    claim = await leases.claim("train", [])
    assert claim is not None
    before = await seconds_of(lambda: read_then_write(database), CLAIMS)
    after = await seconds_of(lambda: leases.claim("train", []), CLAIMS)
    print(f"claims/s, {TENANTS * JOBS_EACH} queued       {1 / before:10.0f} {1 / after:10.0f} {before / after:6.2f}")
    before = await seconds_of(lambda: write_lines(database, claim, 1), LINES)
    after = await seconds_of(lambda: write_lines(database, claim, BATCH), LINES // BATCH * 5) / BATCH
    print(f"lines/s, one | {BATCH} a batch   {1 / before:10.0f} {1 / after:10.0f} {before / after:6.2f}")


@contextlib.asynccontextmanager
async def opened(url: str) -> AsyncIterator[Database]:
    """The registry at `url` for as long as the block runs."""
    database = await Database.open(url)
    try:
        yield database
    finally:
        await database.close()


async def main(postgres: bool) -> None:
    """Measure SQLite on this disk, or a Postgres of its own that syncs nothing."""
    if postgres:
        with running() as cluster:
            async with opened(await cluster.empty()) as database:
                await measure(database)
        return
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as directory:
        async with opened(f"sqlite+aiosqlite:///{directory}/tenora.db") as database:
            await measure(database)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--postgres", action="store_true", help="on Postgres instead of SQLite")
    asyncio.run(main(parser.parse_args().postgres))
