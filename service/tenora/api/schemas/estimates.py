"""What a fine-tuning job would take."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal, Self

from tenora.api.schemas.base import ResponseModel
from tenora.api.schemas.settings import echo_of
from tenora.control.jobs.estimates import Estimate
from tenora.training.settings import ESTIMATED

if TYPE_CHECKING:
    from tenora.api.schemas.base import ResponseModel as EstimatedSettings
else:
    EstimatedSettings = echo_of("EstimatedSettings", ESTIMATED)


class DuplicatePairObject(ResponseModel):
    """Lines of a held-out row and of the training row that it nearly is; a `similarity` of 1 is equal.

    `train_task` names the file of the training row, as `tasks` do.
    """

    train_line: int
    held_out_line: int
    similarity: float
    train_task: str


class TaskEstimateObject(ResponseModel):
    """What one training file holds."""

    name: str
    file: str
    weight: float
    rows: int
    held_out_rows: int
    tokens: int
    near_duplicates: int
    near_duplicate_pairs: list[DuplicatePairObject]


class ReplacesObject(ResponseModel):
    """The version that the job's name means now, which its result would be held against."""

    name: str
    version: int
    digest: str


class EstimateObject(EstimatedSettings):
    """An `Estimate` of the control plane; `seconds` is null until the service has measured its speed.

    Attributes:
        steps, evaluations: of the whole run, over all its folds or trials; with early stopping the most there may be.
        read_tokens, measured_tokens: that the model reads in the steps, and at the evaluations.
    """

    object: Literal["fine_tuning.estimate"] = "fine_tuning.estimate"
    rows: int
    held_out_rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    left_out: int
    near_duplicates: int
    folds: int
    trials: int
    steps: int
    evaluations: int
    read_tokens: int
    measured_tokens: int
    tokens_per_second: float | None
    seconds: float | None
    measured: bool
    replaces: ReplacesObject | None
    tasks: list[TaskEstimateObject]

    @classmethod
    def of(cls, record: Estimate) -> Self:
        """The object of an estimate."""
        found = dataclasses.asdict(record)
        return cls.model_validate({**found.pop("settings"), **found, "measured": record.measured})
