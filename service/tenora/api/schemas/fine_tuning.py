"""Fine-tuning jobs, as OpenAI's SDK types define them, with Tenora's own fields beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, StrictBool

from tenora.api.schemas.base import RequestModel, ResponseModel, auto_or_number, invalid
from tenora.api.schemas.evaluation import EvaluationObject, ReplacedObject
from tenora.control.gate.takeover import Code
from tenora.control.jobs.records import SETTINGS, CheckpointRecord, JobRecord, JobRequest, Publish
from tenora.control.jobs.requests import HYPERPARAMETERS
from tenora.control.jobs.sweeps import MAX_TRIALS
from tenora.control.registry.tables import JobStatus
from tenora.training.recipes import MAX_BATCH_SIZE, MAX_EPOCHS

MAX_SUFFIX = 64
AutoInt = int | Literal["auto"] | None
AutoFloat = float | Literal["auto"] | None


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


def _evaluations(value: Any) -> Any:
    if value is None or isinstance(value, bool) or (isinstance(value, int) and 0 <= value <= 1000):
        return value
    raise invalid("must be true, false or a whole number from 0 to 1000")


def _values(value: Any) -> Any:
    """Lists and objects go on as they are: the use case knows the bounds of each dimension."""
    if value is None or (isinstance(value, list | dict) and len(value) <= MAX_TRIALS):
        return value
    raise invalid("must be a list of values or an object with min and max")


Epochs = Annotated[AutoInt, PlainValidator(auto_or_number(int, 1, MAX_EPOCHS), json_schema_input_type=AutoInt)]
BatchSize = Annotated[AutoInt, PlainValidator(auto_or_number(int, 1, MAX_BATCH_SIZE), json_schema_input_type=AutoInt)]
Multiplier = Annotated[AutoFloat, PlainValidator(auto_or_number(float, 1e-4, 1e4), json_schema_input_type=AutoFloat)]
Beta = Annotated[AutoFloat, PlainValidator(auto_or_number(float, 1e-6, 10), json_schema_input_type=AutoFloat)]
Values = Annotated[Any, PlainValidator(_values, json_schema_input_type=list[float] | dict[str, float | bool] | None)]


class Hyperparameters(RequestModel):
    """OpenAI's three. "auto", the default, is chosen from the number of rows and tokens."""

    n_epochs: Epochs = None
    batch_size: BatchSize = None
    learning_rate_multiplier: Multiplier = None


class PreferenceHyperparameters(Hyperparameters):
    """Those of DPO; `batch_size` counts pairs."""

    beta: Beta = None


class Supervised(RequestModel):
    """Options of supervised fine-tuning."""

    hyperparameters: Hyperparameters | None = None


class Preference(RequestModel):
    """Options of direct preference optimisation."""

    hyperparameters: PreferenceHyperparameters | None = None


class Method(RequestModel):
    """How to train; the options are those of the type that is named."""

    type: Literal["supervised", "dpo"]
    supervised: Supervised | None = None
    dpo: Preference | None = None


class Lora(RequestModel):
    """Shape of the adapter, and an adapter of one's own to start from; its shape is the default then."""

    rank: int | None = Field(default=None, ge=1, le=256)
    alpha: float | None = Field(default=None, gt=0, le=4096)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    target_modules: Annotated[
        list[str] | Literal["all-linear"] | None,
        PlainValidator(_modules, json_schema_input_type=list[str] | Literal["all-linear"] | None),
    ] = None
    use_rslora: bool | None = None
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


class JobCreateRequest(RequestModel):
    """POST /v1/fine_tuning/jobs."""

    model: str = Field(min_length=1, max_length=600, description="The base, or an adapter of one's own to go on from.")
    training_file: str | None = Field(default=None, min_length=1, max_length=128)
    training_files: list[TrainingFile] | None = Field(default=None, description="Instead of `training_file`.")
    validation_file: str | None = Field(default=None, min_length=1, max_length=128)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(default=None, description="The older place for the method's own.")
    n_epochs: Epochs = None
    batch_size: BatchSize = None
    suffix: str | None = Field(default=None, min_length=1, max_length=MAX_SUFFIX)
    seed: int | None = Field(
        default=None, ge=0, lt=2**31, description="Draws the held-out rows and all of training; 0 unless given."
    )
    metadata: Metadata | None = None
    integrations: list[Any] | None = Field(default=None, max_length=0, description="Not supported.")
    name: str | None = Field(default=None, max_length=64, description="The name under which the adapter is called.")
    lora: Lora | None = None
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    scheduler: Literal["linear", "cosine", "constant"] | None = None
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    weight_decay: float | None = Field(default=None, ge=0, le=1)
    max_grad_norm: float | None = Field(default=None, gt=0, le=1000)
    max_seq_length: int | None = Field(default=None, ge=8, lt=2**31)
    max_steps: int | None = Field(
        default=None, ge=0, lt=2**31, description="Instead of n_epochs; 0 lets the epochs decide."
    )
    truncate: StrictBool | None = Field(default=None, description="Cut rows that are too long, do not refuse them.")
    packing: StrictBool | None = None
    eval_interval: int | None = Field(default=None, ge=0, lt=2**31, description="In steps; 0 is once an epoch.")
    early_stopping: Annotated[
        bool | int | None, PlainValidator(_evaluations, json_schema_input_type=bool | int | None)
    ] = Field(default=None, description="End after so many evaluations without a better one; true is 3, 0 never does.")
    publish: Publish | None = Field(
        default=None,
        description="Whether `name` shall mean the result. if_better, the default: only if its held-out loss is lower "
        "than that of the version that the name means, on rows that neither has learned; a new name means its first "
        "version. always; never. Withheld or not, the version is stored and callable by `fine_tuned_model` and "
        "`name@digest`, and `published` says what was decided.",
    )
    min_gain: float | None = Field(
        default=None,
        ge=0,
        le=100,
        description="With if_better: the gain that is asked for, in nats per learned token, per pair of DPO; of a new "
        "name over the base.",
    )
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
            n_epochs=self.n_epochs,
            batch_size=self.batch_size,
            lora=_set_fields(self.lora),
            sweep=None if self.sweep is None else _set_fields(self.sweep),
            suffix=self.suffix,
            name=self.name,
            seed=self.seed,
            metadata=self.metadata,
            **{name: getattr(self, name) for name in SETTINGS},
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


class JobObject(ResponseModel):
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
    learning_rate: float | None
    scheduler: str | None
    warmup_ratio: float | None
    weight_decay: float | None
    max_grad_norm: float | None
    max_seq_length: int | None
    max_steps: int | None
    truncate: bool | None
    packing: bool | None
    eval_interval: int | None
    early_stopping: int | None
    publish: Publish | None
    min_gain: float | None
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
    sent: Mapping[str, Any] = record.method or {"type": "supervised"}
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
