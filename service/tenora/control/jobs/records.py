"""A job as it is asked for and as it is told. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tenora.control.registry.tables import JobStatus


class JobRequest:
    """A fine-tuning job as asked for; values None or "auto" are resolved when the files are read.

    Attributes:
        model: the base's id, or an adapter of the tenant to go on from (the same as `lora["init_from"]`).
        training_file: id; or `training_files` for several: objects of file, weight and name, each a task of its own.
        method: `{"type": <method>, <method>: {"hyperparameters": {…}}}`, echoed in the job.
        hyperparameters: the older place for those of the method that all methods have.
        lora: its shape (`tenora.training.spec.LoraSpec`), and init_from.
        adapter: the same of any kind, with its `type` (`tenora.training.kinds`); instead of `lora`.
        sweep: values to try; see `tenora.control.jobs.sweeps`.
        name: alias under which the result is callable; made from `suffix` or the job's id if absent.
        settings: those of `tenora.training.settings.SETTINGS`, and hyperparameters that stand by themselves; the
            given ones.
    """

    def __init__(
        self,
        *,
        model: str,
        training_file: str | None = None,
        training_files: Sequence[Mapping[str, Any]] | None = None,
        validation_file: str | None = None,
        method: Mapping[str, Any] | None = None,
        hyperparameters: Mapping[str, Any] | None = None,
        lora: Mapping[str, Any] | None = None,
        adapter: Mapping[str, Any] | None = None,
        sweep: Mapping[str, Any] | None = None,
        suffix: str | None = None,
        name: str | None = None,
        seed: int | None = None,
        metadata: Mapping[str, str] | None = None,
        **settings: Any,
    ) -> None:
        self.model = model
        self.training_file = training_file
        self.training_files = training_files
        self.validation_file = validation_file
        self.method = method
        self.hyperparameters = hyperparameters or {}
        self.lora = lora or {}
        self.adapter = adapter or {}
        self.sweep = sweep
        self.suffix = suffix
        self.name = name
        self.seed = seed
        self.metadata = metadata
        self.settings = {setting: value for setting, value in settings.items() if value is not None}


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
