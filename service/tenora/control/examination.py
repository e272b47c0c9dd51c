"""The last look at an adapter before it is published: the gate, and what its card says."""

from __future__ import annotations

import asyncio
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec

from tenora.adapters.ref import AdapterRef
from tenora.control.baselines import Baselines, Measuring
from tenora.control.blobs import Blob
from tenora.control.card import (
    Card,
    FewShot,
    Lineage,
    Parent,
    TrainingFile,
    compare,
    forgetting,
    overfitting,
)
from tenora.control.job_context import JobContext
from tenora.control.job_rows import Claim, owned
from tenora.control.names import unix_now
from tenora.control.parity import Parity, compare_paths, probe_rows, require_weights, score_rows
from tenora.control.schema import JobRow
from tenora.control.scoring import Scorer
from tenora.errors import RateLimitedError, TrainingError, UnavailableError
from tenora.training.dataset import TokenizedDataset
from tenora.training.spec import FinishedEvent, HeldOut, TrainSpec

WITHHELD = frozenset({"parity_failed", "parity_unavailable", "untrained_modules"})
"""Codes of jobs whose adapter did not pass."""
_URGENT = -1  # before the tenant's own requests: a finished adapter waits for nothing else
_PACKAGES = ("tenora", "torch", "transformers")


async def examine(
    context: JobContext, claim: Claim, spec: TrainSpec, event: FinishedEvent, blob: Blob, measuring: Measuring
) -> Card:
    """Let the stored adapter through, or not, and say what it is worth.

    Args:
        spec: of the run that made it; its files are still there.
        blob: the adapter where it will be served from.
        measuring: the base's figures.

    Raises:
        TrainingError: codes parity_failed, untrained_modules; parity_unavailable: the engine runs and could not score.
        UnavailableError: the engine is gone; the run can be resumed and ends here again.
    """
    directory = context.blobs.store.path(blob.digest)
    modules = await asyncio.to_thread(
        require_weights,
        directory,
        context.blobs.targets,
        spec.lora.target_modules,
        max_rank=context.blobs.max_rank,
    )
    base = await measuring.result(few_shot=spec.folds > 0)
    scorer = Scorer(context.engine, claim.tenant_id, priority=_URGENT)
    ref = AdapterRef(digest=blob.digest, path=str(directory))
    rows = []
    if event.probe is not None:
        rows = probe_rows(await asyncio.to_thread(TokenizedDataset.load, Path(event.probe.path)))
        rows = rows[: len(event.probe.rows)]
    try:
        served = await score_rows(scorer, rows, ref)
    except (RateLimitedError, UnavailableError) as error:
        if not context.engine.alive or error.code in {"engine_lost", "engine_shutdown", "draining"}:
            raise
        raise TrainingError(
            f"The adapter could not be tried out before publishing: {error.message}", code="parity_unavailable"
        ) from error
    parity = compare_paths(
        rows,
        served,
        event.probe.rows if event.probe is not None else (),
        base.probe,
        dtype=context.engine.ready.dtype,
        modules=modules,
    )
    async with context.database.read() as session:
        row = await owned(session, claim)
    return await asyncio.to_thread(_card, row, spec, event, base, parity)


def _card(row: JobRow, spec: TrainSpec, event: FinishedEvent, base: Baselines, parity: Parity) -> Card:
    held_out, few_shot = None, None
    notes = list(base.notes)
    if event.held_out is not None:
        held_out = compare(event.held_out.tokens, event.held_out.adapter, event.held_out.start, seed=spec.seed)
        few_shot = _few_shot(event.held_out, base, seed=spec.seed)
    else:
        notes.append("Preference pairs have no loss per token that could be compared with the base's.")
    if not base.complete:
        notes.append("The run was over before the base was measured on all rows that were meant.")
    if parity.gap is None:
        notes.append("The run named no probe rows, so serving was not compared with training token by token.")
    return Card(
        source="cross-validation" if spec.folds else "held-out rows",
        held_out=held_out,
        few_shot=few_shot,
        forgetting=forgetting(event.general_loss, event.base_general_loss, tokens=len(spec.general_text) - 1),
        overfitting=overfitting(event.valid_loss, event.last_loss),
        near_duplicates=base.near_duplicates,
        parity=parity,
        lineage=_lineage(row, spec, event, base.files),
        notes=notes,
    )


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


def _lineage(row: JobRow, spec: TrainSpec, event: FinishedEvent, files: list[TrainingFile]) -> Lineage:
    return Lineage(
        job_id=row.id,
        base_model=spec.base_model,
        parent=None if row.parent is None else Parent(name=row.parent, digest=row.parent_digest or ""),
        files=files,
        settings=settings_of(spec, event.trial),
        seed=spec.seed,
        versions={name: metadata.version(name) for name in _PACKAGES},
        created_at=row.created_at,
        finished_at=unix_now(),
    )


def settings_of(spec: TrainSpec, trial: int | None) -> dict[str, Any]:
    """The resolved settings of a run; of a sweep those of the winner."""
    if trial is not None:
        point = spec.trials[trial]
        lora = msgspec.structs.replace(spec.lora, rank=point.rank, alpha=point.alpha)
        spec = msgspec.structs.replace(
            spec, lora=lora, learning_rate=point.learning_rate, n_epochs=point.n_epochs, batch_size=point.batch_size
        )
    names = [
        "method",
        "lora",
        "n_epochs",
        "max_steps",
        "batch_size",
        "learning_rate",
        "scheduler",
        "warmup_ratio",
        "weight_decay",
        "max_grad_norm",
        "eval_interval",
        "early_stopping",
        "packing",
        "folds",
    ]
    if spec.method == "dpo":
        names.append("beta")
    values: dict[str, Any] = msgspec.to_builtins(spec)
    return {name: values[name] for name in names}
