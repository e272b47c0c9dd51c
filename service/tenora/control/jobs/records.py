"""A job as it is asked for and as it is told. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from tenora.control.registry.tables import JobStatus

Publish = Literal["always", "if_better", "never"]
USUAL_PUBLISH: Publish = "if_better"
SETTINGS = (
    *("learning_rate", "scheduler", "warmup_ratio", "weight_decay", "max_grad_norm", "max_seq_length", "max_steps"),
    *("truncate", "packing", "eval_interval", "early_stopping"),
    *("publish", "min_gain"),
)
"""Fields of a job that belong to no other object."""


@dataclass(frozen=True, slots=True)
class JobRequest:
    """A fine-tuning job as asked for; values None or "auto" are resolved when the files are read.

    Attributes:
        model: the base's id, or an adapter of the tenant to go on from (the same as `lora["init_from"]`).
        training_file: id; or `training_files` for several: objects of file, weight and name, each a task of its own.
        method: `{"type": "supervised" | "dpo", <type>: {"hyperparameters": {…}}}`, echoed in the job.
        hyperparameters: the older place for those of the method: n_epochs, batch_size, learning_rate_multiplier (each a
            number or "auto"); `n_epochs` and `batch_size` may also stand by themselves.
        lora: rank, alpha, dropout, target_modules (list or "all-linear"), use_rslora, init_from.
        learning_rate: peak of the schedule, instead of the multiplier.
        max_seq_length: tokens of a row; longer ones are an error, or are cut with `truncate`.
        max_steps: optimizer steps, instead of epochs; 0 lets the epochs decide.
        packing: False gives each row a pass of its own.
        eval_interval: optimizer steps between evaluations; 0 is once an epoch.
        early_stopping: evaluations without a better one after which to end; True is 3, False and 0 never do.
        publish: whether the name shall mean the result: always, if_better (the default) than what it means, or never.
        min_gain: of if_better: nats per learned token, per pair of DPO, by which it must be better.
        sweep: values to try; see `tenora.control.jobs.sweeps`.
        name: alias under which the result is callable; made from `suffix` or the job's id if absent.
    """

    model: str
    training_file: str | None = None
    training_files: Sequence[Mapping[str, Any]] | None = None
    validation_file: str | None = None
    method: Mapping[str, Any] | None = None
    hyperparameters: Mapping[str, Any] = field(default_factory=dict)
    n_epochs: int | str | None = None
    batch_size: int | str | None = None
    lora: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float | None = None
    scheduler: str | None = None
    warmup_ratio: float | None = None
    weight_decay: float | None = None
    max_grad_norm: float | None = None
    max_seq_length: int | None = None
    max_steps: int | None = None
    truncate: bool | None = None
    packing: bool | None = None
    eval_interval: int | None = None
    early_stopping: bool | int | None = None
    publish: str | None = None
    min_gain: float | None = None
    sweep: Mapping[str, Any] | None = None
    suffix: str | None = None
    name: str | None = None
    seed: int | None = None
    metadata: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A fine-tuning job. `hyperparameters`, `lora` and `settings` hold numbers once the files were read.

    Attributes:
        model: as asked for: the base, or the adapter that the job goes on from.
        training_files: all of them, if the job named a list; `training_file` is the first one.
        settings: the fields of `SETTINGS`.
        sweep_results: a row per trial, with the keys of `tenora.control.jobs.sweeps.TRIAL_COLUMNS`.
        parent, parent_digest: name and digest of the adapter that it started from.
        published: what became of the result, as `tenora.control.gate.takeover.Published`.
    """

    id: str
    tenant_id: str
    tenant: str
    model: str
    status: JobStatus
    training_file: str
    training_files: Sequence[Mapping[str, Any]] | None
    validation_file: str | None
    hyperparameters: Mapping[str, Any]
    lora: Mapping[str, Any]
    settings: Mapping[str, Any]
    method: Mapping[str, Any] | None
    sweep: Mapping[str, Any] | None
    sweep_results: Sequence[Mapping[str, Any]] | None
    parent: str | None
    parent_digest: str | None
    suffix: str | None
    name: str
    seed: int
    metadata: Mapping[str, str] | None
    created_at: int
    finished_at: int | None
    estimated_finish: int | None
    fine_tuned_model: str | None
    trained_tokens: int | None
    error: Mapping[str, Any] | None  # {code, message, param}
    result_files: Sequence[str]
    evaluation: Mapping[str, Any] | None  # {valid_loss, valid_accuracy, base_loss, best_step, steps, ...}
    published: Mapping[str, Any] | None


@dataclass(frozen=True, slots=True)
class JobEventRecord:
    """One line of a job's log; `data` carries numbers when `type` is "metrics"."""

    id: str
    job_id: str
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """A checkpoint of a job, callable as `fine_tuned_model_checkpoint`."""

    id: str
    job_id: str
    created_at: int
    step_number: int
    fine_tuned_model_checkpoint: str
    metrics: Mapping[str, float | int]
