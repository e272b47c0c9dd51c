"""A finished run becomes an adapter: blob first, then one transaction for version, alias, job and result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tenora.control.adapters.blobs import Blob
from tenora.control.adapters.full_card import full_card
from tenora.control.adapters.row_record import Keys, RowRecord
from tenora.control.adapters.rows import active_version
from tenora.control.adapters.versions import NewVersion, add_version
from tenora.control.gate.baselines import Measuring
from tenora.control.gate.card import Card, Judgement, as_json
from tenora.control.gate.examination import WITHHELD, Examined, examine
from tenora.control.gate.predecessor import Beside, Predecessor, find_predecessor, hold_against, rows_of
from tenora.control.gate.takeover import Decision, Published, decide
from tenora.control.inference.scoring import Scorer
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, owned, read_owned
from tenora.control.jobs.requests import Asked
from tenora.control.jobs.rows import PausedError, end, finite, log, result_name
from tenora.control.registry.database import Session
from tenora.control.registry.tables import AdapterRow, AdapterVersionRow, JobRow
from tenora.control.worker.checkpoints import withdraw_checkpoints
from tenora.control.worker.log import evaluation_of
from tenora.control.worker.result_files import Model, ResultFile, discard_results, write_results
from tenora.errors import TrainingError
from tenora.training.events import FinishedEvent
from tenora.training.settings import PUBLISHING
from tenora.training.spec import TrainSpec


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
        if event.path:
            await _publish(context, claim, spec, event, measuring)
        else:
            await _publish_model(context, claim, spec, event, measuring)
    except TrainingError as error:
        if error.code in WITHHELD:
            await withdraw_checkpoints(context, claim)
        raise


async def _publish(
    context: JobContext, claim: Claim, spec: TrainSpec, event: FinishedEvent, measuring: Measuring
) -> None:
    async with context.blobs.publishing(event.path) as blob:
        context.failpoints.hit("publish.after_blob")
        examined = await examine(context, claim, spec, event, blob, measuring)
        rows, keys = await rows_of(context, claim, spec, examined.held_out)
        results = await write_results(context, claim, _model(event, examined.card))
        try:
            context.failpoints.hit("publish.after_result_file")
            moved = None
            while not isinstance(moved, Moved):
                predecessor = await _predecessor(context, claim)
                judged = await _judge(context, claim, spec, event, examined, keys, predecessor)
                async with context.database.write() as session:
                    moved = await _record_result(context, session, claim, event, blob, results, rows, judged)
                    await session.flush()
                    context.failpoints.hit("publish.before_commit")
        except BaseException:
            await discard_results(context, results)
            raise
    context.failpoints.hit("publish.after_commit")
    if moved.pinned is not None and moved.stays_pinned:
        await context.adapters.pins.move(moved.pinned, blob.digest)
    elif moved.pinned is not None:
        await context.adapters.pins.let_go(moved.pinned)


async def _publish_model(
    context: JobContext, claim: Claim, spec: TrainSpec, event: FinishedEvent, measuring: Measuring
) -> None:
    """End a job whose result is a model to download and nothing to call: its name means what it meant."""
    card = (await examine(context, claim, spec, event, None, measuring)).card
    results = await write_results(context, claim, _model(event, card))
    try:
        async with context.database.write() as session:
            row = await _unpaused(session, claim)
            session.add_all([result.row() for result in results])
            row.trained_tokens = event.trained_tokens
            row.evaluation = {name: finite(value) for name, value in evaluation_of(event).items()} | card.as_json()
            row.result_files = [result.id for result in results]
            end(row, "succeeded")
            log(
                session,
                row,
                "No adapter was made of the model. " + ("" if card.full_model is None else card.full_model.reason),
            )
            await session.flush()  # keeps the order of the lines
            log(session, row, f"The model is the file {results[-1].id}, {results[-1].size:,} bytes")
            await session.flush()
            log(session, row, "The job has successfully completed")
            await session.flush()
            context.failpoints.hit("publish.before_commit")
    except BaseException:
        await discard_results(context, results)
        raise
    context.failpoints.hit("publish.after_commit")


def _model(event: FinishedEvent, card: Card) -> Model | None:
    return None if event.full is None else Model(event.full.path, full_card(evaluation_of(event) | card.as_json()))


async def _unpaused(session: Session, claim: Claim) -> JobRow:
    """The job's row; PausedError if it waits for being resumed."""
    row = await owned(session, claim)
    if row.status == "paused":
        raise PausedError("The job was paused; resume it to publish what it has learned.")
    return row


@dataclass(frozen=True, slots=True)
class Judged:
    """A result beside what its name meant when it was looked at."""

    card: Card
    evaluation: Mapping[str, Any]
    predecessor: Predecessor | None
    beside: Beside


@dataclass(frozen=True, slots=True)
class Moved:
    """A job whose rows are written.

    Attributes:
        pinned: the digest that its pinned alias pointed at before it moved.
        stays_pinned: the alias still is.
    """

    pinned: str | None = None
    stays_pinned: bool = False


async def _predecessor(context: JobContext, claim: Claim) -> Predecessor | None:
    async with context.database.read() as session:
        row = await read_owned(session, claim)
        return await find_predecessor(session, row.tenant_id, row.name)


async def _judge(
    context: JobContext,
    claim: Claim,
    spec: TrainSpec,
    event: FinishedEvent,
    examined: Examined,
    keys: Keys,
    predecessor: Predecessor | None,
) -> Judged:
    """Hold the result against what its name means. It takes its time, so it is no part of the transaction."""
    beside = Beside(why_not="The name is new.")
    if predecessor is not None:
        beside = await hold_against(
            context,
            predecessor,
            examined.held_out,
            keys,
            Scorer.behind_requests(context.engine, claim.tenant_id),
            base_model=spec.base_model,
            parent_digest=Path(spec.init_path).name or None,
        )
    card = examined.card
    card = msgspec.structs.replace(
        card,
        verdicts={**card.verdicts, "replaced": Judgement.of(beside.comparison, beside.why_not or "")},
        replaced=None if predecessor is None else predecessor.replaced(beside.comparison),
        notes=card.notes if beside.note is None else [*card.notes, beside.note],
    )
    evaluation = {name: finite(value) for name, value in evaluation_of(event).items()} | card.as_json()
    return Judged(card, evaluation, predecessor, beside)


async def _record_result(
    context: JobContext,
    session: Session,
    claim: Claim,
    event: FinishedEvent,
    blob: Blob,
    results: Sequence[ResultFile],
    rows: RowRecord | None,
    judged: Judged,
) -> Moved | None:
    """Write every row of a published job; None, and nothing written, if its name means something else by now."""
    row = await _unpaused(session, claim)
    before = await active_version(session, row.tenant_id, row.name)
    if (None if before is None else before[1].id) != (judged.predecessor and judged.predecessor.id):
        return None
    model = await result_name(session, row)
    settings = Asked.stored(row.requested).settings
    decision = decide(
        settings.get("publish", PUBLISHING["publish"].default),
        settings.get("min_gain", PUBLISHING["min_gain"].default),
        digest=blob.digest,
        replaced=judged.card.replaced,
        base=judged.card.base,
        why_not=judged.beside.why_not,
        note=judged.beside.note,
    )
    new = NewVersion(
        row.tenant_id,
        row.name,
        row.model,
        source="job",
        job_id=row.id,
        model_name=model,
        evaluation=judged.evaluation,
        parent=row.parent,
        parent_digest=row.parent_digest,
        rows=rows,
    )
    alias, version = await add_version(session, new, blob, moves=decision.moves)
    session.add_all([result.row() for result in results])
    row.fine_tuned_model = model
    row.trained_tokens = event.trained_tokens
    row.evaluation = dict(judged.evaluation)
    row.published = as_json(
        Published(
            alias_moved=decision.moves,
            version=version.version,
            digest=blob.digest,
            code=decision.code,
            reason=decision.reason,
            replaced=judged.card.replaced,
        )
    )
    row.result_files = [result.id for result in results]
    end(row, "succeeded")
    log(session, row, _said(alias, version, decision), level="warn" if decision.warns else "info")
    await session.flush()  # keeps the order of the lines
    moved = Moved()
    if before is not None and decision.moves and alias.pinned:
        moved = await _with_pin(context, session, row, alias, before[1].digest)
    log(session, row, f"New fine-tuned model created: {model}")
    await session.flush()
    log(session, row, "The job has successfully completed")
    return moved


async def _with_pin(context: JobContext, session: Session, row: JobRow, alias: AdapterRow, before: str) -> Moved:
    """A pinned alias has moved: its pin goes with it, or ends and its owner is told why."""
    too_much = await context.adapters.pins.end_beyond_room(session, alias)
    if too_much is not None:
        log(session, row, f"{alias.name} is pinned no longer: {too_much}", level="warn")
        await session.flush()
    return Moved(before, stays_pinned=too_much is None)


def _said(alias: AdapterRow, version: AdapterVersionRow, decision: Decision) -> str:
    """What the owner is told of the name."""
    if decision.moves:
        return f"{alias.name} means version {version.version} now. {decision.reason}"
    return (
        f"{alias.name} does not mean this result, version {version.version}. {decision.reason} It is callable as "
        f"{version.model_name} and {alias.name}@{version.digest[:12]}; to have the name mean it, POST "
        f'/v1/adapters/{alias.name}/rollback {{"version": {version.version}}}.'
    )
