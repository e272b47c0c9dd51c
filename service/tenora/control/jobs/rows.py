"""Rows of jobs, their events and checkpoints inside an open transaction."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args

from sqlalchemy import Select, delete, false, func, select

from tenora.control.jobs.lease_rows import drop_lease
from tenora.control.jobs.records import CheckpointRecord, JobEventRecord, JobRecord
from tenora.control.jobs.requests import METADATA_KEY, model_name
from tenora.control.registry.database import Session
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import TERMINAL, CheckpointRow, JobEventRow, JobRow, JobStatus, TenantRow
from tenora.errors import NotFoundError, TenoraError

T = TypeVar("T")
KEPT_STEPS = 5000
_THINNED_EVERY = 500  # steps: it reads the job's whole log
PAUSED_LINE = "The job was paused"
UNFINISHED: tuple[JobStatus, ...] = ("validating_files", "queued", "running")


class PausedError(TenoraError):
    """The job was paused while its run ended: the result waits in its work directory until it is resumed."""

    code = "paused"


async def count_jobs(session: Session) -> dict[str, int]:
    """Jobs of all tenants by status, every status named; answered from the index `ix_jobs_status` alone."""
    rows = await session.execute(select(JobRow.status, func.count()).group_by(JobRow.status))
    return dict.fromkeys(get_args(JobStatus), 0) | {row.status: row[1] for row in rows}


async def find_job(session: Session, tenant_id: str, job_id: str, *, writes: bool = False) -> JobRow:
    """The row of a job, or NotFoundError, equal for missing and foreign ids.

    Args:
        writes: lock it until the transaction ends, which writes it.
    """
    query = select(JobRow).where(JobRow.tenant_id == tenant_id, JobRow.id == job_id)
    row = await session.scalar(query.with_for_update() if writes else query)
    if row is None:
        raise NotFoundError(f"There is no fine-tuning job {job_id!r}; list yours.", param="fine_tuning_job_id")
    return row


def jobs_of(tenant_id: str, metadata: Mapping[str, str]) -> Select[JobRow]:
    """The jobs of a tenant that carry all entries of `metadata`."""
    query = select(JobRow).where(JobRow.tenant_id == tenant_id)
    for key, value in metadata.items():
        # A key that no job can have would make a malformed JSON path.
        usable = METADATA_KEY.fullmatch(key) is not None
        query = query.where(JobRow.labels[key].as_string() == value if usable else false())
    return query


async def unfinished_jobs(session: Session, tenant_id: str) -> Sequence[JobRow]:
    """The jobs of a tenant that are not over, to be written: their rows are locked until the transaction ends."""
    query = select(JobRow).where(JobRow.tenant_id == tenant_id, JobRow.status.not_in(sorted(TERMINAL)))
    return (await session.scalars(query.with_for_update())).all()


def events_of(tenant_id: str, job_id: str) -> Select[JobEventRow]:
    """The lines of a job's log."""
    return select(JobEventRow).where(JobEventRow.tenant_id == tenant_id, JobEventRow.job_id == job_id)


def checkpoints_of(tenant_id: str, job_id: str) -> Select[CheckpointRow]:
    """The checkpoints of a job."""
    return select(CheckpointRow).where(CheckpointRow.tenant_id == tenant_id, CheckpointRow.job_id == job_id)


async def checkpoint_at(session: Session, row: JobRow, step: int) -> CheckpointRow | None:
    """The checkpoint that a job has of a step."""
    query = checkpoints_of(row.tenant_id, row.id).where(CheckpointRow.step_number == step)
    found: CheckpointRow | None = await session.scalar(query)
    return found


async def delete_checkpoints(session: Session, row: JobRow, *, kept: int) -> set[str]:
    """Delete the job's checkpoints but the newest `kept`; the digests that they named."""
    newest_first = checkpoints_of(row.tenant_id, row.id).order_by(CheckpointRow.step_number.desc())
    digests: set[str] = set()
    for old in (await session.scalars(newest_first)).all()[kept:]:
        digests.add(old.digest)
        await session.delete(old)
    return digests


async def unfinished(session: Session) -> set[tuple[str, str]]:
    """Tenant and id of every job that is not over; for the start."""
    query = select(JobRow.tenant_id, JobRow.id).where(JobRow.status.not_in(sorted(TERMINAL)))
    return {(row.tenant_id, row.id) for row in await session.execute(query)}


async def peek_job(session: Session, tenant_id: str, job_id: str) -> JobRow | None:
    """The row of a job, to be read; its tenant may be gone, and the row with it."""
    found: JobRow | None = await session.scalar(
        select(JobRow).where(JobRow.tenant_id == tenant_id, JobRow.id == job_id)
    )
    return found


async def step_metrics(session: Session, tenant_id: str, job_id: str) -> Sequence[Mapping[str, Any]]:
    """What the lines of a job's steps carry, oldest first."""
    lines = events_of(tenant_id, job_id).where(JobEventRow.type == "metrics").order_by(JobEventRow.seq)
    return (await session.scalars(lines.with_only_columns(JobEventRow.data))).all()


async def result_name(session: Session, row: JobRow) -> str:
    """The immutable name of a job's result."""
    tenant = await session.get_one(TenantRow, row.tenant_id)
    return model_name(row.model, tenant.name, row.suffix, row.id)


async def recent_speeds(session: Session, count: int) -> Sequence[float]:
    """Tokens a second of the latest steps, whichever tenant's."""
    speed = JobEventRow.data["tokens_per_second"].as_float()
    query = select(speed).where(JobEventRow.type == "metrics", speed > 0).order_by(JobEventRow.seq.desc())
    return [float(value) for value in await session.scalars(query.limit(count))]


async def recent_metrics(session: Session, row: JobRow, count: int) -> Sequence[Mapping[str, Any]]:
    """The numbers of the latest lines of a job's log that have any, the newest first."""
    lines = select(JobEventRow.data).where(JobEventRow.tenant_id == row.tenant_id, JobEventRow.job_id == row.id)
    query = lines.where(JobEventRow.type == "metrics").order_by(JobEventRow.seq.desc()).limit(count)
    return (await session.scalars(query)).all()


def end(row: JobRow, status: JobStatus, error: Mapping[str, Any] | None = None) -> None:
    """Give the job a terminal status."""
    row.status = status
    row.finished_at = unix_now()
    row.estimated_finish = None
    row.error = None if error is None else dict(error)
    drop_lease(row)


def log(
    session: Session,
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


async def thin_steps(session: Session, row: JobRow, first: int, last: int, total: int) -> None:
    """Bound the lines of steps in a job's log, once steps `first` to `last` of `total` are in it.

    All of the newest `KEPT_STEPS` stay, and of those before them, evenly, as many again. Other lines stay.
    """
    stride = math.ceil(total / KEPT_STEPS)
    if stride < 2 or first // _THINNED_EVERY == (last + 1) // _THINNED_EVERY:
        return
    step = JobEventRow.data["step"].as_integer()
    await session.execute(
        delete(JobEventRow)
        .where(JobEventRow.tenant_id == row.tenant_id, JobEventRow.job_id == row.id, JobEventRow.type == "metrics")
        .where(JobEventRow.data["train_loss"].as_string().is_not(None))  # or it is the line of an evaluation
        .where(step <= last - KEPT_STEPS, step % stride != 0)
        .execution_options(synchronize_session=False)
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
