"""Parts of a job and of an estimate, as the server sends them."""

from __future__ import annotations

from collections.abc import Sequence

from tenora_client.api_object import Part
from tenora_client.settings import SweptValues, TrialSettings


class TrainingFile(Part):
    """One of several files, a task of its own; its rows are seen `weight` times as often as those of others."""

    file: str
    weight: float = 1.0
    name: str | None = None


class Sweep(SweptValues):
    """The values to try, as they were asked for."""

    sampler: str | None = None
    trials: int | None = None


class Trial(TrialSettings):
    """A trial of a sweep: its settings and what came of it.

    Attributes:
        status: queued, running, stopped (others were better), finished or failed.
        valid_loss: the best so far; None before the first evaluation.
        winner: it became the job's result.
        reason: why it failed.
    """

    trial: int
    status: str
    step: int | None = None
    total_steps: int | None = None
    valid_loss: float | None = None
    winner: bool = False
    reason: str | None = None


class CheckpointMetrics(Part):
    """What a checkpoint came to; what was not a number is absent.

    Attributes:
        train_loss, train_mean_token_accuracy: means over the steps since the checkpoint before.
        valid_loss, valid_mean_token_accuracy: on all held-out rows, as are those that begin with full.
    """

    step: int | None = None
    train_loss: float | None = None
    train_mean_token_accuracy: float | None = None
    valid_loss: float | None = None
    valid_mean_token_accuracy: float | None = None
    full_valid_loss: float | None = None
    full_valid_mean_token_accuracy: float | None = None


class Replaces(Part):
    """The version that a job's name means now, which its result would be held against."""

    name: str
    version: int
    digest: str


class NearDuplicate(Part):
    """Lines of a held-out row and of the training row that it nearly is; a `similarity` of 1 is equal."""

    train_line: int
    held_out_line: int
    similarity: float
    train_task: str | None = None


class TaskEstimate(Part):
    """What one training file holds."""

    name: str
    file: str
    weight: float = 1.0
    rows: int
    held_out_rows: int
    tokens: int
    near_duplicates: int = 0
    near_duplicate_pairs: Sequence[NearDuplicate] = ()
