"""Fine-tuning jobs, as OpenAI's SDK types define them, with Tenora's own fields beside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar

from pydantic import BaseModel

from tenora.api.schemas.base import ResponseModel
from tenora.api.schemas.evaluation import EvaluationObject, ReplacedObject
from tenora.api.schemas.job_parts import (
    AdapterShapeObject,
    CheckpointMetrics,
    EventData,
    HyperparametersObject,
    LoraObject,
    MethodObject,
    SweepObject,
    TrainingFileObject,
    TrialObject,
)
from tenora.api.schemas.settings import echo_of
from tenora.control.gate.takeover import Code
from tenora.control.jobs.records import CheckpointRecord, JobRecord
from tenora.control.registry.tables import JobStatus
from tenora.training.methods.table import METHODS, USUAL
from tenora.training.settings import HYPERPARAMETERS, SETTINGS
from tenora.training.spec import LORA_ASKED, USUAL_KIND

T = TypeVar("T", bound=BaseModel)

if TYPE_CHECKING:
    from tenora.api.schemas.base import ResponseModel as SettingEchoes
else:
    SettingEchoes = echo_of("SettingEchoes", SETTINGS)


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
    hyperparameters: HyperparametersObject
    model: str
    organization_id: str
    result_files: list[str]
    seed: int
    status: JobStatus
    trained_tokens: int | None
    training_file: str
    training_files: list[TrainingFileObject] | None
    validation_file: str | None
    estimated_finish: int | None
    integrations: list[Any] | None = None
    metadata: dict[str, str] | None
    method: MethodObject
    name: str
    suffix: str | None
    lora: LoraObject
    adapter: AdapterShapeObject
    sweep: SweepObject | None
    sweep_results: list[TrialObject] | None
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
            hyperparameters=HyperparametersObject.model_validate(
                {name: record.hyperparameters[name] for name in HYPERPARAMETERS}
            ),
            model=record.model,
            organization_id=record.tenant_id,
            result_files=list(record.result_files),
            seed=record.seed,
            status=record.status,
            trained_tokens=record.trained_tokens,
            training_file=record.training_file,
            training_files=_all(TrainingFileObject, record.training_files),
            validation_file=record.validation_file,
            estimated_finish=record.estimated_finish,
            metadata=None if record.metadata is None else dict(record.metadata),
            method=_method(record),
            name=record.name,
            suffix=record.suffix,
            lora=LoraObject.model_validate(_lora(record.lora)),
            adapter=AdapterShapeObject.model_validate({"type": USUAL_KIND, **record.lora}),
            **{name: record.settings.get(name) for name in SETTINGS},
            sweep=None if record.sweep is None else SweepObject.model_validate(record.sweep),
            sweep_results=_all(TrialObject, record.sweep_results),
            parent=record.parent,
            parent_digest=record.parent_digest,
            evaluation=None if record.evaluation is None else EvaluationObject.model_validate(record.evaluation),
            published=None if record.published is None else PublishedObject.model_validate(record.published),
        )


def _lora(shape: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the adapter's shape says of LoRA's settings; that of LoRA itself as it is stored."""
    return shape if "type" not in shape else {name: value for name, value in shape.items() if name in LORA_ASKED}


def _method(record: JobRecord) -> MethodObject:
    """The method as sent, with the hyperparameters that were resolved since."""
    sent: Mapping[str, Any] = record.method or {"type": USUAL.name}
    method = METHODS.get(sent["type"])
    options = {"hyperparameters": record.hyperparameters} if method is None else method.placed(record.hyperparameters)
    return MethodObject.model_validate({**sent, sent["type"]: options})


def _all(kind: type[T], stored: Sequence[Mapping[str, Any]] | None) -> list[T] | None:
    return None if stored is None else [kind.model_validate(one) for one in stored]


class JobEventObject(ResponseModel):
    """A line of a job's log: a `JobEventRecord` of the control plane; `data` is empty unless `type` is "metrics"."""

    id: str
    object: Literal["fine_tuning.job.event"] = "fine_tuning.job.event"
    created_at: int
    level: Literal["info", "warn", "error"]
    message: str
    type: Literal["message", "metrics"]
    data: EventData


class CheckpointObject(ResponseModel):
    """A checkpoint of a job, callable by `fine_tuned_model_checkpoint`."""

    id: str
    object: Literal["fine_tuning.job.checkpoint"] = "fine_tuning.job.checkpoint"
    created_at: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    step_number: int
    metrics: CheckpointMetrics

    @classmethod
    def of(cls, record: CheckpointRecord) -> Self:
        """The object of a record."""
        return cls(
            id=record.id,
            created_at=record.created_at,
            fine_tuned_model_checkpoint=record.fine_tuned_model_checkpoint,
            fine_tuning_job_id=record.job_id,
            step_number=record.step_number,
            metrics=CheckpointMetrics.model_validate(record.metrics),
        )
