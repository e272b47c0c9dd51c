"""Checkpoints of a job: callable while it runs and after it, the newest few of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.control.adapters.blobs import Blob
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, owned
from tenora.control.jobs.requests import model_name
from tenora.control.jobs.rows import finite
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import CheckpointRow, JobRow, TenantRow
from tenora.training.spec import CheckpointEvent

KEPT_CHECKPOINTS = 3  # callable ones of a job, as OpenAI keeps


async def keep_checkpoint(context: JobContext, claim: Claim, event: CheckpointEvent) -> None:
    """Make a checkpoint callable and let go of the job's oldest ones.

    The run may have removed the directory already when it is far ahead of us; then there is nothing to keep.
    """
    if not await asyncio.to_thread(Path(event.path).is_dir):
        return
    async with context.blobs.publishing(event.path) as blob:
        context.failpoints.hit("jobs.after_checkpoint_blob")
        async with context.database.write() as session:
            row = await owned(session, claim)
            dropped = await _record_checkpoint(session, row, event, blob)
    await context.blobs.release(dropped)


async def withdraw_checkpoints(context: JobContext, claim: Claim) -> None:
    """Make the job's checkpoints callable no more: they would be served as wrongly as the result."""
    async with context.database.write() as session:
        row = await owned(session, claim)
        of_job = (CheckpointRow.tenant_id == row.tenant_id, CheckpointRow.job_id == row.id)
        digests = set(await session.scalars(select(CheckpointRow.digest).where(*of_job)))
        await session.execute(delete(CheckpointRow).where(*of_job))
    await context.blobs.release(digests)


async def result_name(session: AsyncSession, row: JobRow) -> str:
    """The immutable name of a job's result."""
    tenant = await session.get_one(TenantRow, row.tenant_id)
    return model_name(row.model, tenant.name, row.suffix, row.id)


async def _record_checkpoint(session: AsyncSession, row: JobRow, event: CheckpointEvent, blob: Blob) -> set[str]:
    """Write the checkpoint's row, over that of an earlier attempt at this step; digests that lost a row."""
    of_job = (CheckpointRow.tenant_id == row.tenant_id, CheckpointRow.job_id == row.id)
    metrics = {
        "step": event.step,
        "train_loss": event.train_loss,
        "train_mean_token_accuracy": event.train_accuracy,
        "valid_loss": event.valid_loss,
        "valid_mean_token_accuracy": event.valid_accuracy,
        "full_valid_loss": event.valid_loss,
        "full_valid_mean_token_accuracy": event.valid_accuracy,
    }
    dropped: set[str] = set()
    checkpoint = await session.scalar(select(CheckpointRow).where(*of_job, CheckpointRow.step_number == event.step))
    if checkpoint is None:
        checkpoint = CheckpointRow(
            id=new_id("ftckpt"),
            tenant_id=row.tenant_id,
            job_id=row.id,
            created_at=unix_now(),
            step_number=event.step,
            model_name=f"{await result_name(session, row)}:ckpt-step-{event.step}",
        )
        session.add(checkpoint)
    else:
        dropped.add(checkpoint.digest)
    checkpoint.digest = blob.digest
    checkpoint.metrics = {name: value for name, value in metrics.items() if finite(value) is not None}
    await session.flush()
    kept = select(CheckpointRow).where(*of_job).order_by(CheckpointRow.step_number.desc()).offset(KEPT_CHECKPOINTS)
    for old in await session.scalars(kept):
        dropped.add(old.digest)
        await session.delete(old)
    return dropped
