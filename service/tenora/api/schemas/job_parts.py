"""Parts of a job's answer that are shown as they are stored: what was asked for, and what became of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, create_model

from tenora.api.schemas.base import Number, StoredModel
from tenora.api.schemas.settings import stored_adapter, stored_method, stored_model
from tenora.training.events import TrialStatus
from tenora.training.methods.table import METHODS
from tenora.training.settings import HYPERPARAMETERS, JOB, RUN
from tenora.training.spec import LORA_ASKED, SWEPT, TRIAL


class RangeObject(StoredModel):
    """Values of a sweep between two bounds, even in the logarithm with `log`."""

    min: Number
    max: Number
    log: bool | None = None


if TYPE_CHECKING:
    HyperparametersObject = StoredModel
    AdapterShapeObject = StoredModel
    LoraObject = StoredModel
    MadeWith = StoredModel
    MethodObject = StoredModel
    SweepValues = StoredModel
    TrialSettings = StoredModel
else:
    HyperparametersObject = stored_model(
        "HyperparametersObject", HYPERPARAMETERS, doc='OpenAI\'s three; "auto" until the files were read.'
    )
    MethodObject = stored_method("MethodObject", doc="How the job trains.")
    LoraObject = stored_model(
        "LoraObject",
        LORA_ASKED,
        doc="The adapter's shape: as asked for, and whole once the files were read, but for what a sweep chooses.",
    )
    AdapterShapeObject = stored_adapter("AdapterShapeObject", doc="What the adapter is, of any type.")
    MadeWith = stored_model(
        "MadeWith", RUN | {one.name: one for method in METHODS.values() for one in method.settings} | JOB
    )
    SweepValues = create_model(
        "SweepValues",
        __base__=StoredModel,
        **dict.fromkeys(SWEPT, (list[Number] | RangeObject | None, None)),
    )
    TrialSettings = stored_model("TrialSettings", TRIAL, resolved=True)


class TrainingFileObject(StoredModel):
    """One of several files, a task of its own."""

    file: str
    weight: Number
    name: str


class SweepObject(SweepValues):
    """The values to try, as asked for."""

    sampler: str | None = None
    trials: int | None = None


class TrialObject(TrialSettings):
    """A trial of a sweep: its settings, and what came of it; `winner` is the one that became the result."""

    trial: int
    status: Literal["queued"] | TrialStatus
    step: int
    total_steps: int | None
    valid_loss: Number | None
    winner: bool
    reason: str | None


class LineageSettingsObject(MadeWith):
    """The resolved settings of a run; of a sweep those of the winner. Those of its method are among them."""

    method: str | None = None
    lora: LoraObject | None = None
    folds: int | None = None


class CheckpointMetrics(StoredModel):
    """What a checkpoint came to: means over the steps since the one before, and over all held-out rows."""

    step: int | None = None
    train_loss: Number | None = None
    train_mean_token_accuracy: Number | None = None
    valid_loss: Number | None = None
    valid_mean_token_accuracy: Number | None = None
    full_valid_loss: Number | None = None
    full_valid_mean_token_accuracy: Number | None = None


if TYPE_CHECKING:
    MethodMetrics = CheckpointMetrics
else:
    MethodMetrics = create_model(
        "MethodMetrics",
        __base__=CheckpointMetrics,
        **{
            name: (Number | None, Field(default=None, description=what))
            for method in METHODS.values()
            for name, what in method.metrics.items()
        },
    )


class EventData(MethodMetrics):
    """Numbers of a step, an evaluation, a trial of a sweep or a fold of a cross-validation: those of its kind.

    Beside them is, as `valid_loss/<name>`, the held-out loss of each of several files.
    """

    total_steps: int | None = None
    epoch: Number | None = None
    learning_rate: Number | None = None
    grad_norm: Number | None = None
    trained_tokens: int | None = None
    tokens_per_second: Number | None = None
    base_loss: Number | None = None
    best: int | None = None
    general_loss: Number | None = None
    trial: int | None = None
    status: TrialStatus | None = None
    fold: int | None = None
    fold_step: int | None = None
    fold_total_steps: int | None = None
    fold_valid_loss: Number | None = None
    fold_base_loss: Number | None = None
    folds_done: Number | None = None
    done: int | None = None
    total: int | None = None
