"""Rows of jobs, their events and checkpoints inside an open transaction; leases and fencing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.control.jobs.records import CheckpointRecord, JobEventRecord, JobRecord
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import TERMINAL, CheckpointRow, JobEventRow, JobRow, JobStatus
from tenora.errors import NotFoundError, TenoraError

T = TypeVar("T")
LEASE_SECONDS = 30
PAUSED_LINE = "The job was paused"
UNFINISHED: tuple[JobStatus, ...] = ("validating_files", "queued", "running")


class LeaseLostError(TenoraError):
    """The job changed hands (cancelled, paused, claimed by another worker): this worker may write nothing more.

    Attributes:
        holder: the owner that has the job now; None if its tenant took it, not another worker.
    """

    code = "lease_lost"

    def __init__(self, job_id: str, holder: str | None) -> None:
        super().__init__(f"The job {job_id} is in other hands.")
        self.holder = holder


class PausedError(TenoraError):
    """The job was paused while its run ended: the result waits in its work directory until it is resumed."""

    code = "paused"


@dataclass(frozen=True, slots=True)
class Claim:
    """A job in the hands of one worker, for as long as the row carries the same token."""

    job_id: str
    tenant_id: str
    token: int


async def claim_next(
    session: AsyncSession, owner: str, statuses: Sequence[JobStatus], busy: Collection[str]
) -> Claim | None:
    """Lease the oldest unclaimed job in one of `statuses` that is not among `busy`, whichever tenant's it is."""
    now = unix_now()
    row = await session.scalar(
        select(JobRow)
        .where(
            JobRow.status.in_(statuses),
            JobRow.id.not_in(busy),
            or_(JobRow.lease_owner.is_(None), JobRow.lease_expires_at < now),
        )
        .order_by(JobRow.seq)
        .limit(1)
    )
    if row is None:
        return None
    row.lease_owner = owner
    row.lease_token += 1
    row.lease_expires_at = now + LEASE_SECONDS
    return Claim(row.id, row.tenant_id, row.lease_token)


async def renew(session: AsyncSession, owner: str, claims: Collection[Claim]) -> None:
    """Extend the leases that are still held."""
    for claim in claims:
        await session.execute(
            update(JobRow)
            .where(JobRow.tenant_id == claim.tenant_id, JobRow.id == claim.job_id, JobRow.lease_token == claim.token)
            .where(JobRow.lease_owner == owner)
            .values(lease_expires_at=unix_now() + LEASE_SECONDS)
        )


async def release_dead(session: AsyncSession, owner: str) -> None:
    """At start, when every other owner is known to be dead: their unfinished jobs may be claimed at once."""
    await session.execute(
        update(JobRow)
        .where(JobRow.lease_owner.is_not(None), JobRow.lease_owner != owner)
        .values(lease_owner=None, lease_expires_at=None, lease_token=JobRow.lease_token + 1)
    )


async def release_own(session: AsyncSession, owner: str) -> None:
    """At the end: another process need not wait for our leases to expire."""
    await session.execute(
        update(JobRow).where(JobRow.lease_owner == owner).values(lease_owner=None, lease_expires_at=None)
    )


async def owned(session: AsyncSession, claim: Claim) -> JobRow:
    """The job's row, to be written by the holder of `claim`. LeaseLostError if it is not the holder any more."""
    row = await session.scalar(select(JobRow).where(JobRow.tenant_id == claim.tenant_id, JobRow.id == claim.job_id))
    if row is None or row.lease_token != claim.token:
        raise LeaseLostError(claim.job_id, None if row is None else row.lease_owner)
    return row


def is_held(row: JobRow) -> bool:
    """Whether a worker has the job in its hands."""
    return row.lease_owner is not None and (row.lease_expires_at or 0) >= unix_now()


def drop_lease(row: JobRow) -> None:
    """Take the job out of whoever's hands it is in."""
    row.lease_owner = None
    row.lease_expires_at = None
    row.lease_token += 1


async def count_jobs(session: AsyncSession) -> dict[str, int]:
    """Jobs of all tenants by status, every status named; answered from the index `ix_jobs_status` alone."""
    rows = await session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))
    return dict.fromkeys(get_args(JobStatus), 0) | {row.status: row[1] for row in rows}


async def find_job(session: AsyncSession, tenant_id: str, job_id: str) -> JobRow:
    """The row of a job, or NotFoundError, equal for missing and foreign ids."""
    row = await session.scalar(select(JobRow).where(JobRow.tenant_id == tenant_id, JobRow.id == job_id))
    if row is None:
        raise NotFoundError(f"There is no fine-tuning job {job_id!r}; list yours.", param="fine_tuning_job_id")
    return row


def end(row: JobRow, status: JobStatus, error: Mapping[str, Any] | None = None) -> None:
    """Give the job a terminal status."""
    row.status = status
    row.finished_at = unix_now()
    row.estimated_finish = None
    row.error = None if error is None else dict(error)
    drop_lease(row)


def log(
    session: AsyncSession,
    row: JobRow,
    message: str,
    *,
    level: Literal["info", "warn", "error"] = "info",
    metrics: Mapping[str, Any] | None = None,
) -> None:
    """Append a line to the job's log; with `metrics` it is of the type "metrics"."""
    session.add(
        JobEventRow(
            id=new_id("ftevent"),
            tenant_id=row.tenant_id,
            job_id=row.id,
            created_at=unix_now(),
            level=level,
            message=message,
            type="message" if metrics is None else "metrics",
            data={name: finite(value) for name, value in (metrics or {}).items()},
        )
    )


def finite(value: T) -> T | None:
    """`value`, or None for what JSON cannot carry (NaN and infinities)."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def job_record(row: JobRow, tenant: str) -> JobRecord:
    """The row as it is handed out."""
    return JobRecord(
        id=row.id,
        tenant_id=row.tenant_id,
        tenant=tenant,
        model=row.requested["model"],
        status=row.status,  # type: ignore[arg-type]  # a column of strings; only JobStatus is written
        training_file=row.training_file,
        training_files=row.training_files,
        validation_file=row.validation_file,
        hyperparameters=row.hyperparameters,
        lora=row.lora,
        settings=row.settings,
        method=row.method,
        sweep=row.sweep,
        sweep_results=row.sweep_results,
        parent=row.parent,
        parent_digest=row.parent_digest,
        suffix=row.suffix,
        name=row.name,
        seed=row.seed,
        metadata=row.labels,
        created_at=row.created_at,
        finished_at=row.finished_at,
        estimated_finish=row.estimated_finish,
        fine_tuned_model=row.fine_tuned_model,
        trained_tokens=row.trained_tokens,
        error=row.error,
        result_files=tuple(row.result_files),
        evaluation=row.evaluation,
        published=row.published,
    )


def event_record(row: JobEventRow) -> JobEventRecord:
    """The row as it is handed out."""
    return JobEventRecord(
        id=row.id,
        job_id=row.job_id,
        created_at=row.created_at,
        level=row.level,  # type: ignore[arg-type]  # only `log` writes it
        message=row.message,
        type=row.type,  # type: ignore[arg-type]  # only `log` writes it
        data=row.data,
    )


def checkpoint_record(row: CheckpointRow) -> CheckpointRecord:
    """The row as it is handed out."""
    return CheckpointRecord(
        id=row.id,
        job_id=row.job_id,
        created_at=row.created_at,
        step_number=row.step_number,
        fine_tuned_model_checkpoint=row.model_name,
        metrics=row.metrics,
    )


def is_over(row: JobRow) -> bool:
    """Whether the job has a terminal status."""
    return row.status in TERMINAL
