"""Fine-tuning jobs, as OpenAI's SDK types define them, with Tenora's own fields beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator

from tenora.api.schemas.base import RequestModel, ResponseModel, invalid
from tenora.api.schemas.evaluation import EvaluationObject, ReplacedObject
from tenora.api.schemas.settings import echo_of, method_model, model_of
from tenora.control.gate.takeover import Code
from tenora.control.jobs.records import CheckpointRecord, JobRecord, JobRequest
from tenora.control.jobs.sweeps import MAX_TRIALS
from tenora.control.registry.tables import JobStatus
from tenora.training.methods.table import USUAL
from tenora.training.settings import BY_THEMSELVES, HYPERPARAMETERS, SETTINGS
from tenora.training.spec import LORA

MAX_SUFFIX = 64


def _modules(value: Any) -> Any:
    if value is None or value == "all-linear":
        return value
    if (
        isinstance(value, list)
        and 0 < len(value) <= 64
        and all(isinstance(item, str) and len(item) <= 64 for item in value)
    ):
        return value
    raise invalid('must be "all-linear" or a list of module names')


def _values(value: Any) -> Any:
    """Lists and objects go on as they are: the use case knows the bounds of each dimension."""
    if value is None or (isinstance(value, list | dict) and len(value) <= MAX_TRIALS):
        return value
    raise invalid("must be a list of values or an object with min and max")


Values = Annotated[Any, PlainValidator(_values, json_schema_input_type=list[float] | dict[str, float | bool] | None)]


if TYPE_CHECKING:
    from tenora.api.schemas.base import RequestModel as Hyperparameters
    from tenora.api.schemas.base import RequestModel as LoraFields
    from tenora.api.schemas.base import RequestModel as Method
    from tenora.api.schemas.base import RequestModel as SettingFields
    from tenora.api.schemas.base import ResponseModel as SettingEchoes
else:
    Hyperparameters = model_of(
        "Hyperparameters",
        HYPERPARAMETERS,
        doc='OpenAI\'s three. "auto", the default, is chosen from the number of rows and tokens.',
    )
    Method = method_model("Method", doc="How to train; the options are those of the type that is named.")
    LoraFields = model_of("LoraFields", LORA)
    SettingFields = model_of(
        "SettingFields", {**{name: HYPERPARAMETERS[name] for name in sorted(BY_THEMSELVES)}, **SETTINGS}
    )
    SettingEchoes = echo_of("SettingEchoes", SETTINGS)


class Lora(LoraFields):
    """Shape of the adapter, and an adapter of one's own to start from; its shape is the default then."""

    target_modules: Annotated[
        list[str] | Literal["all-linear"] | None,
        PlainValidator(_modules, json_schema_input_type=list[str] | Literal["all-linear"] | None),
    ] = None
    init_from: str | None = Field(default=None, min_length=1, max_length=600)


class TrainingFile(RequestModel):
    """One of several files, a task of its own; `weight` is how often its rows are seen, relative to the others."""

    file: str = Field(min_length=1, max_length=128)
    weight: float | None = Field(default=None, gt=0, le=1000)
    name: str | None = Field(default=None, min_length=1, max_length=64)


class Sweep(RequestModel):
    """Values to try, in lists or ranges; all of them train at the same time, and the best one is the result."""

    rank: Values = None
    learning_rate: Values = None
    n_epochs: Values = None
    batch_size: Values = None
    sampler: str | None = Field(default=None, max_length=16, description="grid, or random (a Latin hypercube).")
    trials: int | None = Field(default=None, ge=2, le=MAX_TRIALS)


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class JobCreateRequest(SettingFields):
    """POST /v1/fine_tuning/jobs."""

    model: str = Field(min_length=1, max_length=600, description="The base, or an adapter of one's own to go on from.")
    training_file: str | None = Field(default=None, min_length=1, max_length=128)
    training_files: list[TrainingFile] | None = Field(default=None, description="Instead of `training_file`.")
    validation_file: str | None = Field(default=None, min_length=1, max_length=128)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(default=None, description="The older place for the method's own.")
    suffix: str | None = Field(default=None, min_length=1, max_length=MAX_SUFFIX)
    seed: int | None = Field(
        default=None, ge=0, lt=2**31, description="Draws the held-out rows and all of training; 0 unless given."
    )
    metadata: Metadata | None = None
    integrations: list[Any] | None = Field(default=None, max_length=0, description="Not supported.")
    name: str | None = Field(default=None, max_length=64, description="The name under which the adapter is called.")
    lora: Lora | None = None
    sweep: Sweep | None = None

    def to_request(self) -> JobRequest:
        """What the use case takes: only what was set."""
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            training_files=None if self.training_files is None else [_set_fields(one) for one in self.training_files],
            validation_file=self.validation_file,
            method=None if self.method is None else _set_fields(self.method),
            hyperparameters=_set_fields(self.hyperparameters),
            lora=_set_fields(self.lora),
            sweep=None if self.sweep is None else _set_fields(self.sweep),
            suffix=self.suffix,
            name=self.name,
            seed=self.seed,
            metadata=self.metadata,
            **{name: getattr(self, name) for name in SettingFields.model_fields},
        )


def _set_fields(part: RequestModel | None) -> dict[str, Any]:
    return {} if part is None else part.model_dump(exclude_none=True)


class JobError(ResponseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class PublishedObject(ResponseModel):
    """What became of a job's result.

    Attributes:
        alias_moved: the job's name means it now.
        version, digest: of the result, which is callable by id in any case.
        code, reason: why.
    """

    alias_moved: bool
    version: int
    digest: str
    code: Code
    reason: str
    replaced: ReplacedObject | None


class JobObject(SettingEchoes):
    """A fine-tuning job, with the fields of the request that are Tenora's own, in numbers once the files were read.

    Attributes:
        training_files: all of them, if the request named a list; `training_file` is the first one.
        sweep_results: a row per trial of the sweep.
        parent, parent_digest: the adapter that it started from.
        evaluation: what is known of the result.
        published: whether its name means it, and why; null while there is no result.
    """

    id: str
    object: Literal["fine_tuning.job"] = "fine_tuning.job"
    created_at: int
    error: JobError | None
    fine_tuned_model: str | None
    finished_at: int | None
    hyperparameters: dict[str, Any]
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    training_files: list[dict[str, Any]] | None
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any] | None = None
    metadata: dict[str, str] | None
    method: dict[str, Any]
    name: str
    suffix: str | None
    lora: dict[str, Any]
    sweep: dict[str, Any] | None
    sweep_results: list[dict[str, Any]] | None
    parent: str | None
    parent_digest: str | None
    evaluation: EvaluationObject | None
    published: PublishedObject | None

    @classmethod
    def of(cls, record: JobRecord) -> Self:
        """The object of a record."""
        return cls(
            id=record.id,
            created_at=record.created_at,
            error=None if record.error is None else JobError(**record.error),
            fine_tuned_model=record.fine_tuned_model,
            finished_at=record.finished_at,
            hyperparameters={name: record.hyperparameters[name] for name in HYPERPARAMETERS},
            model=record.model,
            organization_id=record.tenant_id,
            result_files=list(record.result_files),
            seed=record.seed,
            status=record.status,
            trained_tokens=record.trained_tokens,
            training_file=record.training_file,
            training_files=None if record.training_files is None else [dict(one) for one in record.training_files],
            validation_file=record.validation_file,
            estimated_finish=record.estimated_finish,
            metadata=None if record.metadata is None else dict(record.metadata),
            method=_method(record),
            name=record.name,
            suffix=record.suffix,
            lora=dict(record.lora),
            **{name: record.settings.get(name) for name in SETTINGS},
            sweep=None if record.sweep is None else dict(record.sweep),
            sweep_results=None if record.sweep_results is None else [dict(trial) for trial in record.sweep_results],
            parent=record.parent,
            parent_digest=record.parent_digest,
            evaluation=None if record.evaluation is None else EvaluationObject.model_validate(record.evaluation),
            published=None if record.published is None else PublishedObject.model_validate(record.published),
        )


def _method(record: JobRecord) -> dict[str, Any]:
    """The method as sent, with the hyperparameters that were resolved since."""
    sent: Mapping[str, Any] = record.method or {"type": USUAL.name}
    return {**sent, sent["type"]: {"hyperparameters": dict(record.hyperparameters)}}


class JobEventObject(ResponseModel):
    """A line of a job's log: a `JobEventRecord` of the control plane."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: dict[str, Any]


class CheckpointObject(ResponseModel):
    """A checkpoint of a job, callable by `fine_tuned_model_checkpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: dict[str, float | int | None]

    @classmethod
    def of(cls, record: CheckpointRecord) -> Self:
        """The object of a record."""
        return cls(
            id=record.id,
            created_at=record.created_at,
            fine_tuned_model_checkpoint=record.fine_tuned_model_checkpoint,
            fine_tuning_job_id=record.job_id,
            step_number=record.step_number,
            metrics={name: value for name, value in record.metrics.items() if value is not None},
        )
