"""What is said of a job's result: its card, and whether its name means it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import Field

from tenora_client.api_object import ApiObject


class Comparison(ApiObject):
    """Held-out loss of a result beside something else's, on the same rows; a `difference` below 0 is better.

    Attributes:
        unit: nats per token, or per pair of preference rows.
        low, high: 95% interval of the difference.
        verdict: better, worse, no difference or too few rows.
    """

    rows: int
    tokens: int
    unit: str = "nats per token"
    adapter_loss: float | None = None
    other_loss: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str


class Replaced(ApiObject):
    """The version that a name meant when the job ended; `comparison` is None if the two could not be compared."""

    name: str
    version: int
    digest: str
    comparison: Comparison | None = None


class Judgement(ApiObject):
    """A verdict (better, worse, no difference, too few rows), or "not measured" with the reason."""

    verdict: str
    reason: str | None = None


class TaskResult(ApiObject):
    """One training file: its examples, how many were cut, and the adapter beside the start on those held out."""

    name: str
    file: str
    weight: float
    trained: int
    held_out: int
    cut: int
    comparison: Comparison | None = None


class EvaluationPoint(ApiObject):
    """An evaluation on the way; that at step 0 is the start's."""

    step: int
    valid_loss: float | None = None
    valid_accuracy: float | None = None


class FullModel(ApiObject):
    """A model that was trained whole; `reason` says why an adapter is served in its place, or none.

    Attributes:
        digest: SHA-256 over its files.
        trained: weights that were trained.
        valid_loss: held-out loss of the model itself.
        rank: mean one of the adapter that is served; 0 without one.
        allowed_gap, allowed_kl: what its distance to the model may be, in nats per token.
        curve: the distance at each rank that was tried: `rank`, `highest`, `weights`, `loss`, `gap`, `kl`.
    """

    digest: str
    trained: int
    valid_loss: float | None = None
    served: bool
    reason: str
    rank: int = 0
    allowed_gap: float | None = None
    allowed_kl: float | None = None
    curve: Sequence[Mapping[str, Any]] = ()


class HeadBeside(ApiObject):
    """A head beside something that needs none, on the same rows: "most common", "tf-idf" or "few-shot base".

    Attributes:
        measure: of a row: accuracy, or squared error.
        head, other, difference: means, and head - other; low, high: its 95% interval.
    """

    name: str
    rows: int
    measure: str
    head: float | None = None
    other: float | None = None
    difference: float | None = None
    low: float | None = None
    high: float | None = None
    verdict: str
    shots: int = 0


class HeadResult(ApiObject):
    """What a head is worth on the held-out rows.

    Attributes:
        accuracy, low, high: share of rows that are right and its 95% interval; None for numbers.
        confusion: [true][said], in the order of `labels`.
        candidates: that were compared by cross-validation on training rows, the best first.
    """

    type: str
    labels: Sequence[str] = ()
    rows: int
    accuracy: float | None = None
    low: float | None = None
    high: float | None = None
    metrics: Mapping[str, float | None] = Field(default_factory=dict)
    confusion: Sequence[Sequence[int]] | None = None
    folds: int = 0
    candidates: Sequence[Mapping[str, Any]] = ()
    beside: Sequence[HeadBeside] = ()


class Evaluation(ApiObject):
    """What is known of a job's result: its card. What was not measured is None, and `notes` says why.

    Attributes:
        verdicts: against "start", "base", "few_shot_base" and "replaced", the version that its name meant.
        held_out, base: beside what training started from, and the base.
        trials: of a sweep that these rows were compared on: the winner looks better on them than on fresh ones.
        full_model: of a full fine-tuning. Where an adapter is served in its place, other figures are the adapter's.
    """

    valid_loss: float | None = None
    valid_accuracy: float | None = None
    base_loss: float | None = None
    best_step: int | None = None
    steps: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None
    source: str | None = None
    verdicts: Mapping[str, Judgement] = Field(default_factory=dict)
    held_out: Comparison | None = None
    base: Comparison | None = None
    replaced: Replaced | None = None
    few_shot: Mapping[str, Any] | None = None
    trials: int = 1
    tasks: Sequence[TaskResult] = ()
    curve: Sequence[EvaluationPoint] = ()
    forgetting: Mapping[str, Any] | None = None
    overfitting: Mapping[str, Any] | None = None
    near_duplicates: int | None = None
    parity: Mapping[str, Any] | None = None
    lineage: Mapping[str, Any] | None = None
    full_model: FullModel | None = None
    notes: Sequence[str] = ()
    head: HeadResult | None = None


class Published(ApiObject):
    """What became of a job's result: whether its name means it now (`alias_moved`), and why."""

    alias_moved: bool
    version: int
    digest: str
    code: str
    reason: str
    replaced: Replaced | None = None
