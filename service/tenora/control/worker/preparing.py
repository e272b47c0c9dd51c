"""`validating_files` → `queued`: the rows are read in a thread."""

from __future__ import annotations

from collections.abc import Sequence

from tenora.control.gate.baselines import NotedTask, note_rows
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, drop_lease, owned, read_owned
from tenora.control.jobs.preparation import Prepared, TaskRows, preparation_of, prepare
from tenora.control.jobs.requests import Asked
from tenora.control.jobs.rows import log
from tenora.control.registry.tables import JobRow
from tenora.data.duplicates import DuplicatePair
from tenora.errors import TenoraError

_LISTED_PAIRS = 5


async def prepare_job(context: JobContext, claim: Claim) -> None:
    """Tokenize the job's files and put it into the queue, or end it with the reason why they cannot be used.

    Raises:
        LeaseLostError: the job was cancelled or paused meanwhile; what was written is the runner's to remove.
    """
    async with context.database.read() as session:
        row = await read_owned(session, claim)
    try:
        preparation, limits = await preparation_of(context.storage, context.blobs, row), context.limits()
        tokens = context.settings.train_tokens_per_microbatch
        prepared = await context.tokenizing.job(
            claim.tenant_id, lambda tokenizer: prepare(preparation, tokenizer, limits, tokens_per_microbatch=tokens)
        )
    except TenoraError as error:
        await context.fail(claim, error)
        return
    context.failpoints.hit("jobs.after_prepare")
    async with context.database.write() as session:
        row = await owned(session, claim)
        row.plan = prepared.plan
        row.hyperparameters = prepared.hyperparameters
        row.lora = prepared.lora
        row.settings = prepared.settings
        row.sweep_results = prepared.sweep_results
        duplicates = None if prepared.folds else sum(task.near_duplicates.count for task in prepared.tasks)
        noted = [
            NotedTask(
                **{name: getattr(task.source, name) for name in ("name", "file", "weight")},
                trained=task.train.examples,
                held_out=0 if task.valid is None else task.valid.examples,
                cut=task.truncated,
            )
            for task in prepared.tasks
        ]
        drawn = not prepared.folds and row.validation_file is None
        split_seed = Asked.stored(row.requested).split_seed if drawn else None
        await note_rows(session, row, noted, split_seed=split_seed, near_duplicates=duplicates)
        row.status = "queued"
        drop_lease(row)
        for warning in _warnings(prepared):
            log(session, row, warning, level="warn")
            await session.flush()
        for line in _described(row, prepared):
            log(session, row, line)
            await session.flush()  # keeps the order of the lines


def _warnings(prepared: Prepared) -> list[str]:
    """What the owner should know of the rows."""
    lines: list[str] = []
    if truncated := sum(task.truncated for task in prepared.tasks):
        lines.append(f"{truncated} rows were cut to fit the sequence length")
    if left_out := sum(task.left_out for task in prepared.tasks):
        lines.append(f"{left_out} pairs were left out: their two answers are equal as the model sees them")
    for task in prepared.tasks:
        found = task.near_duplicates
        if not found.count:
            continue
        where = f"Task {task.source.name}: " if len(prepared.tasks) > 1 else ""
        pairs = [_named(pair, prepared.tasks) for pair in found.pairs[:_LISTED_PAIRS]]
        more = ["…"] if found.count > _LISTED_PAIRS else []
        lines.append(
            f"{where}{found.count} of {found.held_out} held-out rows are near-duplicates of training rows, "
            f"{found.exact} of them equal to one, so the held-out loss will look better than it is. Their lines, held "
            f"out and trained on: {', '.join(pairs + more)}"
        )
    return lines


def _named(pair: DuplicatePair, tasks: Sequence[TaskRows]) -> str:
    of = f" of {tasks[pair.train_part].source.name}" if len(tasks) > 1 else ""
    return f"{pair.held_out_line} and {pair.train_line}{of}"


def _described(row: JobRow, prepared: Prepared) -> list[str]:
    """What will be done, line by line."""
    lines: list[str] = []
    tasks = prepared.tasks
    if len(tasks) > 1:
        lines += [
            f"Task {task.source.name}: {task.train.examples} rows to train on, "
            f"{0 if task.valid is None else task.valid.examples} held out, weight {task.source.weight:g}"
            for task in tasks
        ]
    if row.parent is not None:
        lines.append(f"Training starts from {row.parent} (version {str(row.parent_digest)[:12]})")
    if prepared.sweep_results is not None:
        lines.append(f"The sweep tries {len(prepared.sweep_results)} settings at once and stops the worse ones early")
    train = sum(task.train.examples for task in tasks)
    if prepared.folds:
        lines.append(
            f"Few rows: none is held out; {prepared.folds}-fold cross-validation chooses the number of steps, "
            "then all rows are learned"
        )
        lines.append(f"Files validated ({train} rows to train on), moving job to queued state")
    else:
        valid = sum(0 if task.valid is None else task.valid.examples for task in tasks)
        lines.append(f"Files validated ({train} rows to train on, {valid} held out), moving job to queued state")
    return lines
