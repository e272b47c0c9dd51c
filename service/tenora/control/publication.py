"""A finished run becomes an adapter: blob first, then one transaction for version, alias, job and result file."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.control.baselines import Measuring
from tenora.control.blobs import Blob
from tenora.control.examination import WITHHELD, examine
from tenora.control.job_context import JobContext
from tenora.control.job_requests import model_name
from tenora.control.job_rows import Claim, end, finite, log, owned
from tenora.control.names import new_id, unix_now
from tenora.control.resolution import active_version, one_pair
from tenora.control.result_files import ResultFile, discard_results, write_results
from tenora.control.schema import CheckpointRow, JobRow, TenantRow
from tenora.control.training_log import evaluation_of
from tenora.control.versions import NewVersion, add_version
from tenora.errors import TrainingError
from tenora.training.spec import CheckpointEvent, FinishedEvent, TrainSpec

KEPT_CHECKPOINTS = 3  # callable ones of a job, as OpenAI keeps


async def publish_result(
    context: JobContext, claim: Claim, spec: TrainSpec, event: FinishedEvent, measuring: Measuring
) -> None:
    """Make the run's best adapter callable and end the job as succeeded, all at once or not at all.

    Args:
        spec: of the run.
        measuring: of the base's figures, for the card.

    Raises:
        AdapterFormatError: the run wrote no adapter that this base can serve.
        TrainingError: it did not pass the gate (see `examine`); its checkpoints are withdrawn too.
        LeaseLostError: the job was cancelled or paused meanwhile; nothing is published.
        UnavailableError: the engine is gone; nothing is published, and the run can be resumed.
    """
    context.failpoints.hit("publish.before_blob")
    try:
        await _publish(context, claim, spec, event, measuring)
    except TrainingError as error:
        if error.code in WITHHELD:
            await _withdraw_checkpoints(context, claim)
        raise


async def _publish(
    context: JobContext, claim: Claim, spec: TrainSpec, event: FinishedEvent, measuring: Measuring
) -> None:
    async with context.blobs.publishing(Path(event.path)) as blob:
        context.failpoints.hit("publish.after_blob")
        card = await examine(context, claim, spec, event, blob, measuring)
        evaluation = {name: finite(value) for name, value in evaluation_of(event).items()} | card.as_json()
        results = await write_results(context, claim)
        try:
            context.failpoints.hit("publish.after_result_file")
            async with context.database.write() as session:
                moved = await _record_result(session, claim, event, blob, results, evaluation)
                await session.flush()
                context.failpoints.hit("publish.before_commit")
        except BaseException:
            await discard_results(results)
            raise
    context.failpoints.hit("publish.after_commit")
    if moved is not None:
        await context.adapters.move_pin(moved, blob.digest)


async def keep_checkpoint(context: JobContext, claim: Claim, event: CheckpointEvent) -> None:
    """Make a checkpoint callable and let go of the job's oldest ones.

    The run may have removed the directory already when it is far ahead of us; then there is nothing to keep.
    """
    if not await asyncio.to_thread(Path(event.path).is_dir):
        return
    async with context.blobs.publishing(Path(event.path)) as blob:
        context.failpoints.hit("jobs.after_checkpoint_blob")
        async with context.database.write() as session:
            row = await owned(session, claim)
            dropped = await _record_checkpoint(session, row, event, blob)
    await context.blobs.release(dropped)


async def _record_result(
    session: AsyncSession,
    claim: Claim,
    event: FinishedEvent,
    blob: Blob,
    results: Sequence[ResultFile],
    evaluation: Mapping[str, Any],
) -> str | None:
    """Write every row of a published job; the digest that a pinned alias pointed at before."""
    row = await owned(session, claim)
    before = await one_pair(session, active_version(row.tenant_id, row.name))
    model = await _model_name(session, row)
    new = NewVersion(
        row.tenant_id,
        row.name,
        row.model,
        source="job",
        job_id=row.id,
        model_name=model,
        evaluation=evaluation,
        parent=row.parent,
        parent_digest=row.parent_digest,
    )
    alias, _ = await add_version(session, new, blob)
    session.add_all([result.row(row.tenant_id) for result in results])
    row.fine_tuned_model = model
    row.trained_tokens = event.trained_tokens
    row.evaluation = dict(evaluation)
    row.result_files = [result.id for result in results]
    end(row, "succeeded")
    log(session, row, f"New fine-tuned model created: {model}")
    await session.flush()  # keeps the order of the two lines
    log(session, row, "The job has successfully completed")
    return before[1].digest if before is not None and alias.pinned else None


async def _withdraw_checkpoints(context: JobContext, claim: Claim) -> None:
    """Make the job's checkpoints callable no more: they would be served as wrongly as the result."""
    async with context.database.write() as session:
        row = await owned(session, claim)
        of_job = (CheckpointRow.tenant_id == row.tenant_id, CheckpointRow.job_id == row.id)
        digests = set(await session.scalars(select(CheckpointRow.digest).where(*of_job)))
        await session.execute(delete(CheckpointRow).where(*of_job))
    await context.blobs.release(digests)


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
            model_name=f"{await _model_name(session, row)}:ckpt-step-{event.step}",
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


async def _model_name(session: AsyncSession, row: JobRow) -> str:
    tenant = await session.get_one(TenantRow, row.tenant_id)
    return model_name(row.model, tenant.name, row.suffix, row.id)
