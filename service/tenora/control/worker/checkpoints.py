"""Checkpoints of a job: callable while it runs and after it, the newest few of them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tenora.control.adapters.blobs import Blob
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, owned
from tenora.control.jobs.rows import checkpoint_at, delete_checkpoints, finite, result_name
from tenora.control.registry.database import Session
from tenora.control.registry.ids import new_id, unix_now
from tenora.control.registry.tables import CheckpointRow, JobRow
from tenora.errors import AdapterFormatError
from tenora.training.events import CheckpointEvent

KEPT_CHECKPOINTS = 3  # callable ones of a job, as OpenAI keeps


async def keep_checkpoint(context: JobContext, claim: Claim, event: CheckpointEvent) -> None:
    """Make a checkpoint callable and let go of the job's oldest ones.

    A run that is far ahead of us removes the directory, also while we read it; then there is nothing to keep. One that
    goes on after its engine's death may write it once more.
    """
    while (directory := await asyncio.to_thread(_identity, event.path)) is not None:
        try:
            async with context.blobs.publishing(event.path) as blob:
                context.failpoints.hit("jobs.after_checkpoint_blob")
                async with context.database.write() as session:
                    row = await owned(session, claim)
                    dropped = await _record_checkpoint(session, row, event, blob)
        except (AdapterFormatError, FileNotFoundError):
            if await asyncio.to_thread(_identity, event.path) == directory:
                raise
        else:
            await context.blobs.release(dropped)
            return


def _identity(path: str) -> tuple[int, int] | None:
    """Which directory lies there now; None if there is none."""
    try:
        found = Path(path).stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns  # numbers of inodes are given out again


async def withdraw_checkpoints(context: JobContext, claim: Claim) -> None:
    """Make the job's checkpoints callable no more: they would be served as wrongly as the result."""
    async with context.database.write() as session:
        row = await owned(session, claim)
        digests = await delete_checkpoints(session, row, kept=0)
    await context.blobs.release(digests)


async def _record_checkpoint(session: Session, row: JobRow, event: CheckpointEvent, blob: Blob) -> set[str]:
    """Write the checkpoint's row, over that of an earlier attempt at this step; digests that lost a row."""
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
    checkpoint = await checkpoint_at(session, row, event.step)
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
    return dropped | await delete_checkpoints(session, row, kept=KEPT_CHECKPOINTS)
