"""The last look at an adapter before it is published: the gate, and what its card says."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import msgspec

from tenora.adapters.ref import AdapterRef
from tenora.control.adapters.blobs import Blob
from tenora.control.gate.baselines import Baselines, Measuring, base_of
from tenora.control.gate.card import (
    Against,
    Card,
    Comparison,
    FewShot,
    FullCard,
    HeadCard,
    Judgement,
    TaskCard,
    compare,
    forgetting,
    overfitting,
)
from tenora.control.gate.head_card import head_card
from tenora.control.gate.head_gate import compare_heads, require_heads
from tenora.control.gate.held_out import HeldOutExamples, held_out_rows
from tenora.control.gate.lineage import Rows, lineage_of
from tenora.control.gate.parity import Parity, compare_paths, probe_rows, require_weights, score_rows
from tenora.control.inference.scoring import Scorer, is_gone
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, read_owned
from tenora.control.registry.tables import JobRow
from tenora.data.dataset import TokenizedDataset, concatenate
from tenora.errors import RateLimitedError, TenoraError, TrainingError, UnavailableError
from tenora.model.provenance import BaseSource
from tenora.training.events import FinishedEvent, FullResult, HeadOutcome, HeldOut
from tenora.training.methods.table import find_method
from tenora.training.spec import TrainSpec

WITHHELD = frozenset({"parity_failed", "parity_unavailable", "untrained_modules"})
"""Codes of jobs whose adapter did not pass."""
_URGENT = -1  # before the tenant's own requests: a finished adapter waits for nothing else
_NO_ROWS = "The run says nothing of its held-out rows one by one."


@dataclass(frozen=True, slots=True)
class Examined:
    """An adapter that was let through.

    Attributes:
        card: complete, but for what its name means.
        held_out: what it was measured on; None if the run says nothing of it.
    """

    card: Card
    held_out: HeldOutExamples | None


async def examine(
    context: JobContext, claim: Claim, spec: TrainSpec, event: FinishedEvent, blob: Blob | None, measuring: Measuring
) -> Examined:
    """Let the stored adapter through, or not, and say what the result is worth.

    Args:
        spec: of the run that made it; its files are still there.
        blob: the adapter where it will be served from; None if nothing is to be served.
        measuring: the base's figures.

    Raises:
        TrainingError: codes parity_failed, untrained_modules; parity_unavailable: the engine runs and could not score.
        UnavailableError: the engine is gone; the run can be resumed and ends here again.
    """
    base = await measuring.result(few_shot=spec.folds > 0 or find_method(spec.method).has_head)
    parity = None if blob is None else await _parity(context, claim, spec, event, blob, base)
    async with context.database.read() as session:
        row = await read_owned(session, claim)
    held_out = None
    if event.held_out is not None:
        held_out = await asyncio.to_thread(HeldOutExamples.load, spec, event.held_out)
    against_base = await _against_base(context, claim, spec, held_out)
    source = await base_of(context)
    card = await asyncio.to_thread(_card, row, spec, event, base, parity, held_out, against_base, source)
    if event.head is not None and held_out is not None:
        head = await asyncio.to_thread(_head, spec, event.head, held_out, base)
        card = msgspec.structs.replace(card, head=head)
    return Examined(card, held_out)


async def _parity(
    context: JobContext, claim: Claim, spec: TrainSpec, event: FinishedEvent, blob: Blob, base: Baselines
) -> Parity:
    """The stored adapter through the serving path; raises as `examine`."""
    ref = context.blobs.ref(blob.digest)
    method, modules = find_method(spec.method), 0
    if not method.is_frozen(method.own_settings(spec.method_settings)):
        modules = await asyncio.to_thread(
            require_weights,
            ref.path,
            context.blobs.rows,
            spec.lora if event.full is None else None,  # what a whole model lacks of an adapter is meant
            max_rank=context.blobs.max_rank,
        )
    scorer = Scorer(context.engine, claim.tenant_id, priority=_URGENT)
    rows = []
    if event.probe is not None:
        rows = probe_rows(await asyncio.to_thread(TokenizedDataset.load, Path(event.probe.path)))
        rows = rows[: len(event.probe.rows)]
    try:
        if event.head is not None:
            return await _heads(context, scorer, spec, event.head, ref, modules)
        served = await score_rows(scorer, rows, ref)
    except (RateLimitedError, UnavailableError) as error:
        if is_gone(error, context.engine):
            raise
        raise TrainingError(
            f"The adapter could not be tried out before publishing: {error.message}", code="parity_unavailable"
        ) from error
    return compare_paths(
        rows,
        served,
        event.probe.rows if event.probe is not None else (),
        base.probe,
        dtype=context.engine.ready.dtype,
        modules=modules,
    )


async def _heads(
    context: JobContext, scorer: Scorer, spec: TrainSpec, outcome: HeadOutcome, ref: AdapterRef, modules: int
) -> Parity:
    """The heads of the stored adapter, through the serving path."""
    max_rank = context.blobs.max_rank
    heads = await asyncio.to_thread(require_heads, ref.path, context.blobs.rows, max_rank=max_rank)
    rows = await asyncio.to_thread(held_out_rows, spec)
    return await compare_heads(scorer, heads, outcome, rows, ref, dtype=context.engine.ready.dtype, modules=modules)


def _head(spec: TrainSpec, outcome: HeadOutcome, held_out: HeldOutExamples, base: Baselines) -> HeadCard | None:
    train = concatenate([TokenizedDataset.load(Path(task.train_path)) for task in spec.tasks])
    return head_card(held_out.settings, outcome, train, held_out.dataset, base.head_shots, seed=spec.seed)


async def _against_base(
    context: JobContext, claim: Claim, spec: TrainSpec, held_out: HeldOutExamples | None
) -> Comparison | str:
    """The adapter beside the base, or why it was not measured.

    What training starts from was measured by the run; where that is another adapter the base is scored here.
    """
    if held_out is None:
        return _NO_ROWS
    if not spec.init_path:
        comparison = await asyncio.to_thread(held_out.against_start)
        return _NO_ROWS if comparison is None else comparison
    max_length = context.engine.ready.max_model_len
    chosen = await asyncio.to_thread(held_out.choose, range(held_out.dataset.examples), max_length=max_length)
    try:
        losses = await held_out.score(Scorer.behind_requests(context.engine, claim.tenant_id), chosen, None)
    except TenoraError as error:
        if is_gone(error, context.engine):
            raise
        return f"The base could not be scored: {error.message}"
    comparison = await asyncio.to_thread(held_out.compare, losses)
    return _NO_ROWS if comparison is None else comparison


def _card(
    row: JobRow,
    spec: TrainSpec,
    event: FinishedEvent,
    base: Baselines,
    parity: Parity | None,
    examples: HeldOutExamples | None,
    against_base: Comparison | str,
    source: BaseSource | None,
) -> Card:
    notes = list(base.notes)
    if spec.trials:
        notes.append(
            f"The held-out rows chose this adapter among {len(spec.trials)} trials, so its figures on them look better "
            "than they would on fresh rows."
        )
    held_out = None if examples is None else examples.against_start()
    few_shot = None
    if event.held_out is not None and not find_method(spec.method).no_few_shot:
        few_shot = _few_shot(event.held_out, base, seed=spec.seed)
    base_comparison, no_base = (None, against_base) if isinstance(against_base, str) else (against_base, "")
    verdicts: dict[Against, Judgement] = {
        "start": Judgement.of(held_out, _NO_ROWS),
        "base": Judgement.of(base_comparison, no_base),
        "few_shot_base": Judgement.of(None if few_shot is None else few_shot.comparison, _no_few_shot(spec, base)),
    }
    if not base.complete:
        notes.append("The run was over before the base was measured on all rows that were meant.")
    if parity is not None and parity.gap is None:
        notes.append("The run named no probe rows, so serving was not compared with training token by token.")
    return Card(
        source="cross-validation" if spec.folds else "held-out rows",
        verdicts=verdicts,
        held_out=held_out,
        base=base_comparison,
        replaced=None,
        trials=max(len(spec.trials), 1),
        tasks=_tasks(base, examples),
        curve=event.curve,
        few_shot=few_shot,
        forgetting=forgetting(event.general_loss, event.base_general_loss, tokens=len(spec.general_text) - 1),
        overfitting=overfitting(event.valid_loss, event.last_loss),
        near_duplicates=base.near_duplicates,
        parity=parity,
        full_model=None if event.full is None else _full(event.full, served=parity is not None),
        lineage=lineage_of(row, spec, event, files=base.files, rows=_rows(row, base), base=source),
        notes=notes,
    )


def _full(found: FullResult, *, served: bool) -> FullCard:
    return FullCard(
        digest=found.digest,
        trained=found.trained,
        valid_loss=found.valid_loss,
        served=served,
        reason=found.reason,
        rank=found.rank,
        allowed_gap=found.allowed_gap,
        allowed_kl=found.allowed_kl,
        curve=found.curve,
    )


def _tasks(base: Baselines, examples: HeldOutExamples | None) -> list[TaskCard]:
    """File by file; empty for a job that was prepared by an older version."""
    return [
        TaskCard(
            **msgspec.to_builtins(task),
            comparison=None if examples is None else examples.against_start(number),
        )
        for number, task in enumerate(base.tasks)
    ]


def _rows(row: JobRow, base: Baselines) -> Rows | None:
    if not base.tasks:
        return None
    return Rows(
        trained=sum(task.trained for task in base.tasks),
        held_out=sum(task.held_out for task in base.tasks),
        cut=sum(task.cut for task in base.tasks),
        max_seq_length=row.settings.get("max_seq_length"),
        truncate=bool(row.settings.get("truncate")),
        split_seed=base.split_seed,
    )


def _no_few_shot(spec: TrainSpec, base: Baselines) -> str:
    """Why the adapter was not held against examples in the prompt."""
    if reason := find_method(spec.method).no_few_shot:
        return reason
    return " ".join(base.notes) or "The run was over before it was measured."


def _few_shot(held_out: HeldOut, base: Baselines, *, seed: int) -> FewShot | None:
    """The comparison on the rows that the base was asked with shots before them."""
    measured = base.few_shot
    if measured is None or not measured.rows or max(measured.rows) >= len(held_out.tokens):
        return None
    tokens = [held_out.tokens[row] for row in measured.rows]
    comparison = compare(tokens, [held_out.adapter[row] for row in measured.rows], measured.losses, seed=seed)
    if comparison is None:
        return None
    start = sum(held_out.start[row] for row in measured.rows)
    return FewShot(shots=measured.shots, base_loss=start / comparison.tokens, comparison=comparison)
