"""`validating_files` → `queued`: the rows are read in a thread."""

from __future__ import annotations

import asyncio

from tenora.control.job_context import JobContext
from tenora.control.job_rows import Claim, drop_lease, log, owned
from tenora.control.preparation import Preparation, prepare
from tenora.errors import TenoraError


async def prepare_job(context: JobContext, claim: Claim) -> None:
    """Tokenize the job's files and put it into the queue, or end it with the reason why they cannot be used.

    Raises:
        LeaseLostError: the job was cancelled or paused meanwhile; what was written is the runner's to remove.
    """
    async with context.database.read() as session:
        row = await owned(session, claim)
    work = Preparation.of(
        row,
        training_path=context.storage.file(row.tenant_id, row.training_file),
        validation_path=None
        if row.validation_file is None
        else context.storage.file(row.tenant_id, row.validation_file),
        workdir=context.storage.workdir(row.tenant_id, row.id),
    )
    try:
        prepared = await asyncio.to_thread(
            prepare,
            work,
            context.tokenizer,
            context.limits(),
            tokens_per_microbatch=context.settings.train_tokens_per_microbatch,
        )
    except TenoraError as error:
        await context.fail(claim, error)
        return
    context.failpoints.hit("jobs.after_prepare")
    async with context.database.write() as session:
        row = await owned(session, claim)
        row.plan = prepared.plan
        row.hyperparameters = prepared.hyperparameters
        row.status = "queued"
        drop_lease(row)
        if prepared.truncated:
            log(session, row, f"{prepared.truncated} rows were cut to fit the sequence length", level="warn")
        log(
            session,
            row,
            f"Files validated ({prepared.train_rows} rows to train on, {prepared.valid_rows} held out), "
            "moving job to queued state",
        )
