"""Leases of jobs inside an open transaction: claiming, the fence, letting go."""

from __future__ import annotations

import functools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import CTE, Integer, Select, Update, bindparam, func, or_, select, true, tuple_, update
from sqlalchemy.orm import InstrumentedAttribute, aliased

from tenora.control.registry.database import Session
from tenora.control.registry.dialects.dialect import unix_time
from tenora.control.registry.presence import ALIVE_SECONDS, living
from tenora.control.registry.tables import JobRow, JobStatus, TenantRow
from tenora.errors import TenoraError
from tenora.training.methods.table import METHODS
from tenora.training.settings import USUAL_METHOD

Task = Literal["prepare", "train"]
STATUSES: Final[dict[Task, tuple[JobStatus, ...]]] = {
    "prepare": ("validating_files",),
    "train": ("running", "queued"),
}


class LeaseLostError(TenoraError):
    """The job changed hands (cancelled, paused, claimed by another worker): this worker may write nothing more.

    Attributes:
        holder: the process that has the job now; None if its tenant took it, not another worker.
    """

    code = "lease_lost"

    def __init__(self, job_id: str, holder: str | None) -> None:
        super().__init__(f"The job {job_id} is in other hands.")
        self.holder = holder


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in the hands of one worker, for as long as the row carries the same token."""

    job_id: str
    tenant_id: str
    token: int
    method: str = USUAL_METHOD

    @property
    def runs_apart(self) -> bool:
        """Whether it trains in a process of its own; one whose method is not known here fails when it is prepared."""
        return self.method in METHODS and METHODS[self.method].runs_apart


async def claim_next(
    session: Session,
    process_id: str,
    task: Task,
    busy: Collection[str],
    *,
    most_of_tenant: int | None = None,
    without: Collection[str] = (),
) -> Claim | None:
    """Lease a job for `task` that nobody has and that is not among `busy`, in one statement.

    It is one of the tenant that has the least in hand for this task, by its weight; among equals, of the one that was
    served longest ago; and of that tenant's jobs it is the oldest. A tenant with `most_of_tenant` in hand waits, and so
    does a job whose method is among `without`.
    """
    claimed = await session.execute(
        _claiming(task, bounded=most_of_tenant is not None),
        {"process_id": process_id, "busy": list(busy), "most_of_tenant": most_of_tenant, "without": list(without)},
    )
    row = claimed.one_or_none()
    if row is None:
        return None
    await session.execute(_served(task), {"served": row.tenant_id})
    return Claim(row.id, row.tenant_id, row.lease_token, row.requested.get("method", USUAL_METHOD))


@functools.cache
def _claiming(task: Task, *, bounded: bool) -> Any:  # SQLAlchemy 2.0 and 2.1 spell its type differently
    """`claim_next`'s statement, built once: putting it together takes longer than SQLite takes to carry it out."""
    tenants = _tenants(task)
    next_one = (
        select(JobRow.seq)
        .join(tenants, tenants.c.id == JobRow.tenant_id)
        .where(
            JobRow.status.in_(STATUSES[task]),
            JobRow.id.not_in(bindparam("busy", expanding=True)),
            func.coalesce(JobRow.requested["method"].as_string(), "").not_in(bindparam("without", expanding=True)),
            or_(JobRow.lease_owner.is_(None), JobRow.lease_expires_at < unix_time()),
            tenants.c.in_hand < bindparam("most_of_tenant", type_=Integer) if bounded else true(),
        )
        .order_by(tenants.c.load, tenants.c.turn, JobRow.seq)
        .limit(1)
        .with_for_update(of=JobRow, skip_locked=True)  # SQLite has one writer at a time
    )
    return (
        update(JobRow)
        .where(JobRow.seq == next_one.scalar_subquery())
        .values(
            lease_owner=bindparam("process_id"),
            lease_token=JobRow.lease_token + 1,
            lease_expires_at=unix_time() + ALIVE_SECONDS,
        )
        .returning(JobRow.id, JobRow.tenant_id, JobRow.lease_token, JobRow.requested)
        .execution_options(synchronize_session=False)
    )


def _tenants(task: Task) -> CTE:
    """Of each tenant how many jobs workers have in hand for a task, that by its weight, and its latest turn.

    Told to be counted once: a planner that takes the queue for short counts again for every job in it.
    """
    leased = aliased(JobRow)
    in_hand = (
        select(leased.tenant_id, func.count().label("jobs"))
        .where(leased.status.in_(STATUSES[task]), leased.lease_expires_at >= unix_time())
        .group_by(leased.tenant_id)
        .subquery()
    )
    count = func.coalesce(in_hand.c.jobs, 0)
    return (
        select(
            TenantRow.id, count.label("in_hand"), (count / TenantRow.weight).label("load"), _turn(task).label("turn")
        )
        .outerjoin(in_hand, in_hand.c.tenant_id == TenantRow.id)
        .cte("tenants_in_turn")
        .prefix_with("MATERIALIZED")
    )


@functools.cache
def _served(task: Task) -> Update:
    """Give a tenant the latest turn."""
    turn = _turn(task)
    return (
        update(TenantRow)
        .where(TenantRow.id == bindparam("served"))
        .values({turn.key: select(func.max(turn)).scalar_subquery() + 1})
        .execution_options(synchronize_session=False)
    )


def _turn(task: Task) -> InstrumentedAttribute[int]:
    return TenantRow.prepare_turn if task == "prepare" else TenantRow.train_turn


async def renew(session: Session, process_id: str, claims: Collection[Claim]) -> None:
    """Extend the leases that are still held."""
    held = tuple_(JobRow.tenant_id, JobRow.id, JobRow.lease_token)
    await session.execute(
        update(JobRow)
        .where(JobRow.lease_owner == process_id)
        .where(held.in_([(claim.tenant_id, claim.job_id, claim.token) for claim in claims]))
        .values(lease_expires_at=unix_time() + ALIVE_SECONDS)
        .execution_options(synchronize_session=False)
    )


async def end_dead(session: Session) -> Sequence[JobRow]:
    """End the leases of processes that are not alive, so that their jobs may be claimed at once; of which jobs."""
    owners = select(JobRow.lease_owner).where(JobRow.lease_owner.is_not(None), JobRow.lease_owner.not_in(living()))
    dead = set(await session.scalars(owners.distinct()))  # once dead, it stays so: an id is of one process
    ended = await session.scalars(
        update(JobRow)
        .where(JobRow.lease_owner.in_(dead))
        .values(lease_owner=None, lease_expires_at=None, lease_token=JobRow.lease_token + 1)
        .returning(JobRow)
        .execution_options(synchronize_session=False)
    )
    return ended.all()


async def end_own(session: Session, process_id: str) -> Sequence[JobRow]:
    """At the end: another process need not wait for our leases to expire; of which jobs they were."""
    ended = await session.scalars(
        update(JobRow)
        .where(JobRow.lease_owner == process_id)
        .values(lease_owner=None, lease_expires_at=None)
        .returning(JobRow)
        .execution_options(synchronize_session=False)
    )
    return ended.all()


async def owned(session: Session, claim: Claim) -> JobRow:
    """The job's row, locked until the transaction ends, to be written by the holder of `claim`.

    Raises:
        LeaseLostError: it is not the holder any more.
    """
    return await _held(session, claim, _row(claim).with_for_update())


async def read_owned(session: Session, claim: Claim) -> JobRow:
    """The job's row, in a transaction that writes nothing. LeaseLostError if `claim` is not held any more."""
    return await _held(session, claim, _row(claim))


async def _held(session: Session, claim: Claim, query: Select[JobRow]) -> JobRow:
    row = await session.scalar(query)
    if row is None or row.lease_token != claim.token:
        raise LeaseLostError(claim.job_id, None if row is None else row.lease_owner)
    return row


def _row(claim: Claim) -> Select[JobRow]:
    return select(JobRow).where(JobRow.tenant_id == claim.tenant_id, JobRow.id == claim.job_id)


async def is_held(session: Session, row: JobRow) -> bool:
    """Whether a worker has the job in its hands."""
    if row.lease_owner is None or row.lease_expires_at is None:
        return False
    return row.lease_expires_at >= (await session.execute(select(unix_time()))).scalar_one()


def drop_lease(row: JobRow) -> None:
    """Take the job out of whoever's hands it is in."""
    row.lease_owner = None
    row.lease_expires_at = None
    row.lease_token += 1
