"""Fine-tuning jobs, as OpenAI's SDK types define them, with Tenora's own fields beside."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator

from tenora.api.schemas.base import RequestModel, ResponseModel, auto_or_number, invalid
from tenora.control.records import CheckpointRecord, JobRecord, JobRequest, JobStatus
from tenora.errors import InvalidRequestError
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
    raise invalid('must be "all-linear" or a list of module names such as "q_proj"')


class Hyperparameters(RequestModel):
    """OpenAI's three. "auto", the default, is chosen from the number of rows and tokens."""

    n_epochs: Annotated[AutoInt, PlainValidator(auto_or_number(int, 1, MAX_EPOCHS), json_schema_input_type=AutoInt)] = (
        None
    )
    batch_size: Annotated[
        AutoInt, PlainValidator(auto_or_number(int, 1, MAX_BATCH_SIZE), json_schema_input_type=AutoInt)
    ] = None
    learning_rate_multiplier: Annotated[
        AutoFloat, PlainValidator(auto_or_number(float, 1e-4, 1e4), json_schema_input_type=AutoFloat)
    ] = None


class Supervised(RequestModel):
    """Options of the method."""

    hyperparameters: Hyperparameters | None = None


class Method(RequestModel):
    """How to train. Others than supervised fine-tuning are not supported yet."""

    type: Literal["supervised"]
    supervised: Supervised | None = None


class Lora(RequestModel):
    """Shape of the adapter."""

    rank: int | None = Field(default=None, ge=1, le=256)
    alpha: float | None = Field(default=None, gt=0, le=4096)
    dropout: float | None = Field(default=None, ge=0, lt=1)
    target_modules: Annotated[
        list[str] | Literal["all-linear"] | None,
        PlainValidator(_modules, json_schema_input_type=list[str] | Literal["all-linear"] | None),
    ] = None
    use_rslora: bool | None = None


class Training(RequestModel):
    """Finer settings of the optimization. `truncate` cuts rows that are too long instead of refusing them."""

    learning_rate: float | None = Field(default=None, gt=0, le=1)
    scheduler: Literal["linear", "cosine", "constant"] | None = None
    warmup_ratio: float | None = Field(default=None, ge=0, le=1)
    weight_decay: float | None = Field(default=None, ge=0, le=1)
    max_grad_norm: float | None = Field(default=None, gt=0, le=1000)
    max_seq_length: int | None = Field(default=None, ge=8, lt=2**31)
    max_steps: int | None = Field(default=None, ge=0, lt=2**31)
    eval_interval: int | None = Field(default=None, ge=0, lt=2**31)
    truncate: bool | None = None


Metadata = Annotated[
    dict[Annotated[str, Field(min_length=1, max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]


class JobCreateRequest(RequestModel):
    """POST /v1/fine_tuning/jobs."""

    model: str = Field(min_length=1, max_length=256)
    training_file: str = Field(min_length=1, max_length=128)
    validation_file: str | None = Field(default=None, min_length=1, max_length=128)
    method: Method | None = None
    hyperparameters: Hyperparameters | None = Field(default=None, description="The older place for the method's own.")
    suffix: str | None = Field(default=None, min_length=1, max_length=MAX_SUFFIX)
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    metadata: Metadata | None = None
    integrations: list[Any] | None = Field(default=None, max_length=0, description="Not supported.")
    name: str | None = Field(default=None, max_length=64, description="The name under which the adapter is called.")
    lora: Lora | None = None
    training: Training | None = None

    def to_request(self) -> JobRequest:
        """What the use case takes: only what was set.

        Raises:
            InvalidRequestError: if the hyperparameters stand in both of their places and differ.
        """
        inner = self.method.supervised.hyperparameters if self.method and self.method.supervised else None
        if inner is not None and self.hyperparameters is not None and inner != self.hyperparameters:
            raise InvalidRequestError(
                "hyperparameters differ from those of method. Send them in one place.", param="hyperparameters"
            )
        return JobRequest(
            model=self.model,
            training_file=self.training_file,
            validation_file=self.validation_file,
            hyperparameters=_set_fields(inner or self.hyperparameters),
            lora=_set_fields(self.lora),
            training=_set_fields(self.training),
            method=None if self.method is None else self.method.model_dump(exclude_none=True),
            suffix=self.suffix,
            name=self.name,
            seed=self.seed,
            metadata=self.metadata,
        )


def _set_fields(part: RequestModel | None) -> dict[str, Any]:
    return {} if part is None else part.model_dump(exclude_none=True)


class JobError(ResponseModel):
    """Why a job failed."""

    code: str
    message: str
    param: str | None = None


class JobObject(ResponseModel):
    """A fine-tuning job. `name`, `lora`, `training`, `suffix` and `evaluation` are Tenora's own."""

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
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any] | None = None
    metadata: dict[str, str] | None
    method: dict[str, Any]
    name: str
    suffix: str | None
    lora: dict[str, Any]
    training: dict[str, Any]
    evaluation: dict[str, Any] | None

    @classmethod
    def of(cls, record: JobRecord) -> Self:
        """The object of a record."""
        return cls(
            id=record.id,
            created_at=record.created_at,
            error=None if record.error is None else JobError(**record.error),
            fine_tuned_model=record.fine_tuned_model,
            finished_at=record.finished_at,
            hyperparameters=dict(record.hyperparameters),
            model=record.model,
            organization_id=record.tenant_id,
            result_files=list(record.result_files),
            seed=record.seed,
            status=record.status,
            trained_tokens=record.trained_tokens,
            training_file=record.training_file,
            validation_file=record.validation_file,
            estimated_finish=record.estimated_finish,
            metadata=None if record.metadata is None else dict(record.metadata),
            method=_method(record),
            name=record.name,
            suffix=record.suffix,
            lora=dict(record.lora),
            training=dict(record.training),
            evaluation=None if record.evaluation is None else dict(record.evaluation),
        )


def _method(record: JobRecord) -> dict[str, Any]:
    """The method as sent, with the hyperparameters that were resolved since."""
    sent: Mapping[str, Any] = record.method or {"type": "supervised"}
    return {**sent, "supervised": {"hyperparameters": dict(record.hyperparameters)}}


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
