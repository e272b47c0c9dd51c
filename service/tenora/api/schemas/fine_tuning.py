"""What a fine-tuning job may be asked for: OpenAI's fields, with Tenora's own beside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, create_model

from tenora.api.schemas.base import RequestModel, invalid, no_flag
from tenora.api.schemas.fixed import only
from tenora.api.schemas.settings import adapter_model, method_model, model_of
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.sweeps import MAX_TRIALS
from tenora.training.settings import BY_THEMSELVES, HYPERPARAMETERS, SETTINGS
from tenora.training.spec import LORA_ASKED, SWEPT

MAX_SUFFIX = 64


def _values(value: Any) -> Any:
    """Lists and objects go on as they are: the use case knows the bounds of each dimension."""
    if value is None or (isinstance(value, list | dict) and len(value) <= MAX_TRIALS):
        return value
    raise invalid("must be a list of values or an object with min and max")


Values = Annotated[Any, PlainValidator(_values, json_schema_input_type=list[float] | dict[str, float | bool] | None)]


if TYPE_CHECKING:
    from tenora.api.schemas.base import RequestModel as Adapter
    from tenora.api.schemas.base import RequestModel as Hyperparameters
    from tenora.api.schemas.base import RequestModel as Lora
    from tenora.api.schemas.base import RequestModel as Method
    from tenora.api.schemas.base import RequestModel as SettingFields
    from tenora.api.schemas.base import RequestModel as SweptValues
else:
    Hyperparameters = model_of(
        "Hyperparameters",
        HYPERPARAMETERS,
        doc='OpenAI\'s three. "auto", the default, is chosen from the number of rows and tokens.',
    )
    Method = method_model("Method", doc="How to train; the options are those of the type that is named.")
    Lora = model_of(
        "Lora",
        LORA_ASKED,
        doc="Shape of the adapter, and an adapter of one's own to start from; its shape is the default then.",
    )
    Adapter = adapter_model(
        "Adapter",
        doc="What the adapter is, of any type: a type, and its own settings; instead of `lora`, which is one of them.",
    )
    SweptValues = create_model("SweptValues", __base__=RequestModel, **dict.fromkeys(SWEPT, (Values, None)))
    SettingFields = model_of(
        "SettingFields", {**{name: HYPERPARAMETERS[name] for name in sorted(BY_THEMSELVES)}, **SETTINGS}
    )


class TrainingFile(RequestModel):
    """One of several files, a task of its own; `weight` is how often its rows are seen, relative to the others."""

    file: str = Field(min_length=1, max_length=128)
    weight: float | None = Field(default=None, gt=0, le=1000)
    name: str | None = Field(default=None, min_length=1, max_length=64)


class Sweep(SweptValues):
    """Values to try, in lists or ranges; all of them train at the same time, and the best one is the result."""

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
    seed: Annotated[int | None, BeforeValidator(no_flag)] = Field(
        default=None, ge=0, lt=2**31, description="Draws the held-out rows and all of training; 0 unless given."
    )
    metadata: Metadata | None = None
    integrations: Annotated[list[Any] | None, only([], why="Integrations are not supported. Leave the field out.")] = (
        Field(default=None, description="Not supported, but for [].")
    )
    name: str | None = Field(default=None, max_length=64, description="The name under which the adapter is called.")
    lora: Lora | None = None
    adapter: Adapter | None = None
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
            adapter=_set_fields(self.adapter),
            sweep=None if self.sweep is None else _set_fields(self.sweep),
            suffix=self.suffix,
            name=self.name,
            seed=self.seed,
            metadata=self.metadata,
            **{name: getattr(self, name) for name in SettingFields.model_fields},
        )


def _set_fields(part: RequestModel | None) -> dict[str, Any]:
    return {} if part is None else part.model_dump(exclude_none=True)
