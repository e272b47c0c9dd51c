"""What is said of a finished adapter: figures and verdicts, as plain values that go into the registry as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec
import numpy as np

from tenora.control.gate.lineage import Lineage
from tenora.control.gate.parity import Parity
from tenora.control.jobs.rows import finite
from tenora.training.events import EvaluationPoint, HeadCandidate, RankPoint
from tenora.training.intervals import bootstrap
from tenora.training.methods.method import PER_TOKEN, Unit
from tenora.training.methods.table import find_unit

MIN_ROWS = 6
"""Rows that a verdict needs: with five, all of which agree, a sign test still gives p = 2 · 0.5⁵ = 0.06."""

SOME_OVERFITTING = 1.02
"""Last ÷ best held-out loss. With a few dozen rows it moves by a percent or two from one evaluation to the next without
any trend; a rise beyond that is one."""
STRONG_OVERFITTING = 1.10
"""A tenth of the loss is more than a second epoch gains on most small files: the last epochs undid what came before."""

Verdict = Literal["better", "worse", "no difference", "too few rows"]
Against = Literal["start", "base", "few_shot_base", "replaced"]
Other = Literal["most common", "tf-idf", "few-shot base"]
Measure = Literal["accuracy", "squared error"]
OverfitVerdict = Literal["none", "some", "strong"]
Source = Literal["held-out rows", "cross-validation"]


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Held-out loss of the adapter beside something else's, on the same rows.

    Attributes:
        rows, tokens: what was measured: rows, or pairs of preference rows, and their learned tokens.
        unit: of the losses, in words.
        adapter_loss, other_loss: the means.
        difference: adapter - other; below 0 the adapter is better.
        low, high: 95% interval of the difference, by a paired bootstrap over rows.
        verdict: "better" or "worse" if the interval leaves out 0.
    """

    rows: int
    tokens: int
    adapter_loss: float
    other_loss: float
    difference: float
    low: float
    high: float
    verdict: Verdict
    unit: str = PER_TOKEN.name

    def __str__(self) -> str:
        """In words."""
        what = find_unit(self.unit).examples
        return (
            f"held-out loss {self.adapter_loss:.4f} against {self.other_loss:.4f} on {self.rows} {what}, a difference "
            f"of {self.difference:+.4f} ({self.low:+.4f} to {self.high:+.4f}) {self.unit}: {self.verdict}"
        )


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A verdict, or why there is none."""

    verdict: Verdict | Literal["not measured"]
    reason: str | None = None

    @classmethod
    def of(cls, comparison: Comparison | None, why_not: str) -> Judgement:
        """The verdict of a comparison; `why_not` if there is none."""
        if comparison is None:
            return cls(verdict="not measured", reason=why_not)
        return cls(verdict=comparison.verdict)


class Replaced(msgspec.Struct, frozen=True, kw_only=True):
    """The version that the adapter's name meant when its job ended.

    Attributes:
        comparison: the adapter beside it, on held-out rows that neither has learned; None if there are none.
    """

    name: str
    version: int
    digest: str
    comparison: Comparison | None


class FewShot(msgspec.Struct, frozen=True, kw_only=True):
    """The adapter beside the base that sees `shots` training rows in its prompt, and the base without them.

    Attributes:
        base_loss: the start's on the same rows.
    """

    shots: int
    base_loss: float
    comparison: Comparison


class Forgetting(msgspec.Struct, frozen=True, kw_only=True):
    """Loss on the general text, which has nothing to do with the rows, nats per token; `change` is adapter - base."""

    tokens: int
    adapter_loss: float
    base_loss: float
    change: float


class Overfitting(msgspec.Struct, frozen=True, kw_only=True):
    """What went on after the best evaluation, whose adapter is the published one: `ratio` is last ÷ best."""

    best_loss: float
    last_loss: float
    ratio: float
    verdict: OverfitVerdict


class TaskCard(msgspec.Struct, frozen=True, kw_only=True):
    """One training file.

    Attributes:
        name, file, weight: as the job named it; how often its rows are seen, relative to the others.
        trained, held_out, cut: its examples, as `tenora.control.gate.lineage.Rows` has them for all files.
        comparison: the adapter beside what training started from, on this file's held-out examples.
    """

    name: str
    file: str
    weight: float
    trained: int
    held_out: int
    cut: int
    comparison: Comparison | None


class FullCard(msgspec.Struct, frozen=True, kw_only=True):
    """A model that was trained whole.

    Attributes:
        digest: of its files.
        trained: weights that were trained.
        valid_loss: held-out loss of the model itself.
        served: whether an adapter stands for it here.
        reason: why, or why not.
        rank: of that adapter, on the average over its matrices; 0 without one.
        allowed_gap, allowed_kl: what its distance to the model may be, in nats per token.
        curve: the distances of the ranks that were tried.
    """

    digest: str
    trained: int
    valid_loss: float
    served: bool
    reason: str
    rank: int
    allowed_gap: float
    allowed_kl: float
    curve: list[RankPoint]


class HeadBeside(msgspec.Struct, frozen=True, kw_only=True):
    """The head beside something that needs none, on the same rows.

    Attributes:
        name: "most common" says the same of every row; "tf-idf" is a logistic or ridge head on the tokens of a text,
            its strength cross-validated; "few-shot base" is the base with labelled training rows in its prompt.
        shots: of the few-shot base, these; else 0.
        measure: of a row: whether it is right, or its squared error.
        head, other, difference: the means, and head - other.
        low, high: 95% interval of the difference, by a paired bootstrap over rows.
    """

    name: Other
    rows: int
    measure: Measure
    head: float
    other: float
    difference: float
    low: float
    high: float
    verdict: Verdict
    shots: int = 0


class HeadCard(msgspec.Struct, frozen=True, kw_only=True):
    """One head on the held-out rows.

    Attributes:
        type: of the head.
        labels: of a classification.
        rows: that it was measured on.
        accuracy: share of rows that are right: with several labels, in all of them; None for numbers.
        low, high: its 95% interval (Wilson 1927).
        metrics: macro_f1, auroc, calibration_error; with several labels micro_f1 for the last; of numbers
            mean_absolute_error and r2.
        confusion: [true][said] of one class each, in the order of `labels`; None for others, or for too many classes.
        folds: of the cross-validation that chose what the head reads; 0 if it was not chosen so.
        candidates: that were compared by it, on training rows, the best first.
        beside: what it has to be better than.
    """

    type: str
    labels: list[str]
    rows: int
    accuracy: float | None
    low: float | None
    high: float | None
    metrics: dict[str, float]
    confusion: list[list[int]] | None
    folds: int
    candidates: list[HeadCandidate]
    beside: list[HeadBeside]


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """All of it. What could not be measured is None, and `notes` says why.

    Attributes:
        source: where the held-out figures come from.
        verdicts: against each of `Against`.
        held_out: the adapter beside what training started from.
        base: beside the base; the same as `held_out` where training started from that.
        replaced: beside what its name meant; None if the name is new.
        trials: of a sweep, which these held-out rows were compared on: the winner's figures on them look better than on
            fresh ones. 1 without a sweep.
        tasks: file by file.
        curve: the evaluations, from the start on; of a long run some of them.
        near_duplicates: held-out rows that are nearly rows of the training file.
        parity: None if nothing is served.
        full_model: of a full fine-tuning. Where its model is served as an adapter all other figures are the adapter's.
        head: of an adapter that has one.
    """

    source: Source
    verdicts: dict[Against, Judgement]
    held_out: Comparison | None
    base: Comparison | None
    replaced: Replaced | None
    trials: int
    tasks: list[TaskCard]
    curve: list[EvaluationPoint]
    few_shot: FewShot | None
    forgetting: Forgetting | None
    overfitting: Overfitting | None
    near_duplicates: int | None
    parity: Parity | None
    lineage: Lineage
    full_model: FullCard | None
    notes: list[str]
    head: HeadCard | None = None

    def as_json(self) -> dict[str, Any]:
        """Builtin values, with None for numbers that JSON cannot carry."""
        return as_json(self)


def as_json(said: msgspec.Struct) -> dict[str, Any]:
    """Builtin values, with None for numbers that JSON cannot carry."""
    found: dict[str, Any] = _json(msgspec.to_builtins(said))
    return found


def compare(
    tokens: Sequence[int],
    adapter: Sequence[float],
    other: Sequence[float],
    *,
    seed: int,
    unit: Unit = PER_TOKEN,
) -> Comparison | None:
    """Compare two losses on the same examples; None without a learned token.

    Args:
        tokens: learned tokens of each example.
        adapter, other: losses of each example in nats: of a row summed over its learned tokens.
        seed: of the bootstrap; equal arguments give equal intervals.
        unit: what a mean is over.
    """
    count = np.array(tokens, dtype=np.int64)
    if not count.sum():
        return None
    weights = count if unit.by_token else np.ones_like(count)
    total = int(weights.sum())
    differences = np.array(adapter, dtype=np.float64) - np.array(other, dtype=np.float64)
    low, high = bootstrap(differences, weights, seed=seed)
    return Comparison(
        rows=len(count),
        tokens=int(count.sum()),
        adapter_loss=float(np.sum(adapter)) / total,
        other_loss=float(np.sum(other)) / total,
        difference=float(differences.sum()) / total,
        low=low,
        high=high,
        verdict=verdict_of(len(count), low, high),
        unit=unit.name,
    )


def forgetting(adapter: float | None, base: float | None, *, tokens: int) -> Forgetting | None:
    """From the mean losses on the general text, whose learned tokens are `tokens`; None if one was not measured."""
    if adapter is None or base is None:
        return None
    return Forgetting(tokens=tokens, adapter_loss=adapter, base_loss=base, change=adapter - base)


def overfitting(best_loss: float, last_loss: float) -> Overfitting | None:
    """The verdict on a run whose best and last held-out losses these are; None if there is no last one."""
    if not (best_loss > 0.0 and last_loss > 0.0):
        return None
    ratio = last_loss / best_loss
    verdict: OverfitVerdict = "none" if ratio <= SOME_OVERFITTING else "some"
    if ratio > STRONG_OVERFITTING:
        verdict = "strong"
    return Overfitting(best_loss=best_loss, last_loss=last_loss, ratio=ratio, verdict=verdict)


def verdict_of(rows: int, low: float, high: float) -> Verdict:
    """What the interval of a difference in loss says."""
    if rows < MIN_ROWS:
        return "too few rows"
    if high < 0.0:
        return "better"
    return "worse" if low > 0.0 else "no difference"


def _json(value: Any) -> Any:
    match value:
        case Mapping():
            return {name: _json(inner) for name, inner in value.items()}
        case list() | tuple():
            return [_json(inner) for inner in value]
        case float():
            return finite(value)
        case _:
            return value
