"""The version that a job's name means while the job ends: its result is held against that, on fair rows."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tenora.control.adapters.row_record import Keys, RowRecord, keys_of
from tenora.control.adapters.rows import active_version, rows_of_version, stored_rows
from tenora.control.gate.card import Comparison, Replaced
from tenora.control.gate.held_out import HeldOutExamples
from tenora.control.inference.scoring import Scorer, is_gone
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.lease_rows import Claim, read_owned
from tenora.control.registry.database import Session
from tenora.data.dataset import TokenizedDataset
from tenora.errors import TenoraError, UnavailableError
from tenora.training.spec import TrainSpec


@dataclass(frozen=True, slots=True)
class Predecessor:
    """What a name means.

    Attributes:
        id: the version's row.
        rows: None where nobody knows what it has learned.
        head: the type of its head and the classes; None if it has none that is known.
    """

    id: str
    name: str
    version: int
    digest: str
    base_model: str
    rows: RowRecord | None
    head: tuple[str, ...] | None = None

    def replaced(self, comparison: Comparison | None) -> Replaced:
        """As the card shows it."""
        return Replaced(name=self.name, version=self.version, digest=self.digest, comparison=comparison)


@dataclass(frozen=True, slots=True)
class Beside:
    """A result beside a predecessor: the comparison, or why there is none, and what a reader should know of it."""

    comparison: Comparison | None = None
    why_not: str | None = None
    note: str | None = None


async def find_predecessor(session: Session, tenant_id: str, name: str) -> Predecessor | None:
    """What the name means now; None if nothing."""
    found = await active_version(session, tenant_id, name)
    if found is None:
        return None
    _, row = found
    record = _decoded(await rows_of_version(session, row))
    said = (row.evaluation or {}).get("head")
    head = None if said is None else (str(said["type"]), *map(str, said["labels"]))
    return Predecessor(row.id, name, row.version, row.digest, row.base_model, record, head)


def head_labels(examples: HeldOutExamples) -> tuple[str, ...]:
    """The type of a result's head, and its classes."""
    labels = examples.dataset.labels
    return (str(examples.settings["head_type"]), *(() if labels is None else labels.names))


async def rows_of(
    context: JobContext, claim: Claim, spec: TrainSpec, held_out: HeldOutExamples | None
) -> tuple[RowRecord | None, Keys]:
    """What a result has learned and was measured on, and the keys of the latter."""
    if held_out is None:
        return None, np.zeros(0, dtype=np.uint64)
    async with context.database.read() as session:
        digest = (await read_owned(session, claim)).parent_digest
        parent = None if digest is None else _decoded(await stored_rows(session, claim.tenant_id, digest))

    def read() -> tuple[RowRecord, Keys]:
        keys = train = keys_of(held_out.dataset)
        if not spec.folds:
            train = np.concatenate([keys_of(TokenizedDataset.load(Path(task.train_path))) for task in spec.tasks])
        record = RowRecord.of(
            train,
            keys,
            held_out.result,
            cross_validated=spec.folds > 0,
            parent=parent,
            has_parent=digest is not None,
        )
        return record, keys

    return await asyncio.to_thread(read)


async def hold_against(
    context: JobContext,
    predecessor: Predecessor,
    examples: HeldOutExamples | None,
    keys: Keys,
    scorer: Scorer,
    *,
    base_model: str,
    parent_digest: str | None,
) -> Beside:
    """Compare a result with what its name means, on held-out examples that neither has learned.

    What the predecessor came to when it was measured on one of them is taken from its record; others are scored.

    Args:
        examples: that the result was measured on.
        keys: of them.
        parent_digest: what the result's training started from, which was measured on all of them.

    Raises:
        UnavailableError: the engine is gone.
    """
    named = f"version {predecessor.version}"
    if examples is None:
        return Beside(why_not="the run says nothing of its held-out rows one by one.")
    if predecessor.base_model != base_model:
        return Beside(why_not=f"{named} is an adapter of another base, {predecessor.base_model}.")
    known, fresh = _divide(predecessor.rows, keys, examples.dataset.rows_per_example)
    if examples.method.has_head or not (known or fresh):
        return _unscored(predecessor, examples, known)
    if predecessor.digest == parent_digest:
        start = examples.start
        losses = known | {example: start[example].tolist() for example in fresh}
    else:
        chosen = await asyncio.to_thread(examples.choose, fresh, max_length=context.engine.ready.max_model_len)
        ref = context.blobs.ref(predecessor.digest)
        try:
            losses = known | await examples.score(scorer, chosen, ref)
        except TenoraError as error:
            if isinstance(error, UnavailableError) and is_gone(error, context.engine):
                raise
            return Beside(why_not=f"{named} could not be scored: {error.message}")
    comparison = await asyncio.to_thread(examples.compare, losses)
    if comparison is None:
        return Beside(why_not=f"no row that this job holds out fits, or has a learned token, for {named}.")
    return Beside(comparison=comparison, note=_note(predecessor, len(keys) - len(known) - len(fresh)))


def _unscored(predecessor: Predecessor, examples: HeldOutExamples, known: dict[int, list[float]]) -> Beside:
    """What can be said without asking the predecessor: of a head the rows that both were measured on."""
    named = f"version {predecessor.version}"
    if not examples.method.has_head:
        return Beside(why_not=f"{named} has learned every row that this job holds out.")
    if predecessor.head != head_labels(examples):
        return Beside(why_not=f"{named} has no head of the same type and classes.")
    comparison = examples.compare(known) if known else None
    if comparison is None:
        return Beside(why_not=f"{named} was measured on none of the rows that this job holds out.")
    return Beside(comparison=comparison, note=_note(predecessor, examples.dataset.examples - len(known)))


def _divide(rows: RowRecord | None, keys: Keys, rows_per_example: int) -> tuple[dict[int, list[float]], list[int]]:
    """Of each example the predecessor's losses if it was measured on it, and which others it has not learned."""
    if rows is None:
        return {}, list(range(len(keys)))
    measured, learned = rows.known_losses(rows_per_example), rows.has_learned(keys).tolist()
    by_key: Sequence[int] = keys.tolist()
    known = {example: measured[key] for example, key in enumerate(by_key) if key in measured}
    return known, [example for example, seen in enumerate(learned) if not seen and example not in known]


def _note(predecessor: Predecessor, left_out: int) -> str | None:
    named = f"version {predecessor.version} of {predecessor.name}"
    if predecessor.rows is None or not predecessor.rows.whole:
        return (
            f"It is not known which rows {named} has learned; held-out rows that are among them make it look better "
            "than it is."
        )
    if left_out:
        return f"{left_out} held-out rows that {named} has learned are not part of the comparison with it."
    return None


def _decoded(stored: bytes | None) -> RowRecord | None:
    return None if stored is None else RowRecord.decode(stored)
