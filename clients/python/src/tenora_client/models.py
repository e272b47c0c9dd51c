"""The objects of the API, as the server sends them. Fields that this version does not know are kept (`model_extra`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeAlias, TypeVar

from tenora_client.api_object import ApiObject
from tenora_client.evaluation import Evaluation, Published
from tenora_client.job_parts import CheckpointMetrics, Replaces, Sweep, TaskEstimate, TrainingFile, Trial
from tenora_client.settings import AdapterSettings, EstimatedSettings, Hyperparameters, JobSettings, Lora, Method

T = TypeVar("T")
Message: TypeAlias = Mapping[str, Any]
JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class HasId(Protocol):
    """What can be the cursor of a listing."""

    @property
    def id(self) -> str:
        """The cursor."""


class ListPage(ApiObject, Generic[T]):
    """One page of a listing."""

    data: Sequence[T]
    has_more: bool = False


class Deleted(ApiObject):
    """What a DELETE answers."""

    id: str
    deleted: bool


class Model(ApiObject):
    """A model that can be asked; `parent` is None for the base and the base's id for an adapter."""

    id: str
    created: int
    owned_by: str
    root: str | None = None
    parent: str | None = None
    max_model_len: int | None = None


class UsedAdapter(ApiObject):
    """An adapter of a composition: as it was asked for, the version that this meant, and its weight, scale and all."""

    name: str
    digest: str
    weight: float


class Usage(ApiObject):
    """Tokens of one request, and the adapters that it composed or scaled, if it did."""

    prompt_tokens: int
    completion_tokens: int = 0
    total_tokens: int
    adapters: list[UsedAdapter] | None = None


class ChatMessage(ApiObject):
    """The answer of one choice."""

    role: str
    content: str | None = None


class ChatChoice(ApiObject):
    """One of `n` answers."""

    index: int
    message: ChatMessage
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None


class ChatCompletion(ApiObject):
    """An answer to a conversation; `model` is the name that was asked for."""

    id: str
    created: int
    model: str
    choices: Sequence[ChatChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Text of the first choice."""
        return self.choices[0].message.content or ""


class ChatDelta(ApiObject):
    """What a chunk adds to a choice."""

    role: str | None = None
    content: str | None = None


class ChatChunkChoice(ApiObject):
    """A choice's part of a chunk; the last one has a finish_reason."""

    index: int
    delta: ChatDelta
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None


class ChatChunk(ApiObject):
    """One event of a streamed answer. With `include_usage` the last one has no choices, but the usage."""

    id: str
    created: int
    model: str
    choices: Sequence[ChatChunkChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """New text of the first choice; empty if the chunk brings none."""
        return next((choice.delta.content or "" for choice in self.choices if choice.index == 0), "")


class CompletionChoice(ApiObject):
    """One completion of one prompt, or a part of it when streamed."""

    index: int
    text: str
    finish_reason: str | None = None
    logprobs: Mapping[str, Any] | None = None


class Completion(ApiObject):
    """A text completion, or one event of a streamed one."""

    id: str
    created: int
    model: str
    choices: Sequence[CompletionChoice]
    usage: Usage | None = None

    @property
    def text(self) -> str:
        """Text of the first choice; empty if a chunk brings none."""
        return self.choices[0].text if self.choices else ""


class File(ApiObject):
    """An uploaded file. `status` "error" means unusable for training; `status_details` says why, with line numbers."""

    id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: str
    status_details: str | None = None
    expires_at: int | None = None


class Span(ApiObject):
    """A piece of a row's text: all of its tokens are learned, or none."""

    text: str
    trained: bool


class RowIssue(ApiObject):
    """Why a row cannot be used, and what to do about it."""

    line: int
    code: str
    message: str


class PreviewRow(ApiObject):
    """A row as the model sees it; of a preference one for each answer, of a pair one for each text, told by `part`."""

    line: int
    part: str | None = None
    tokens: int
    trained_tokens: int
    truncated: bool = False
    truncated_tokens: int = 0
    spans: Sequence[Span] = ()
    issues: Sequence[RowIssue] = ()
    label: str | bool | int | float | Sequence[str] | None = None


class PreviewTotals(ApiObject):
    """Sums over the rows shown."""

    rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    unusable: int


class Preview(ApiObject):
    """Some rows of a training file; more follow `after` the line `last_line`."""

    file_id: str
    format: str | None = None
    data: Sequence[PreviewRow]
    totals: PreviewTotals
    has_more: bool = False
    last_line: int | None = None


class Estimate(EstimatedSettings):
    """What a job would take; `seconds` is None until the server has measured its speed.

    Attributes:
        tokens, trained_tokens: of the rows to train on, once.
        left_out: pairs whose two answers are equal as the model sees them.
        steps, evaluations, read_tokens, measured_tokens: of the whole job, over all folds or trials; tokens that the
            model reads to learn, and to measure.
        replaces: the version that the job's name means now, which its result would be held against.
        tasks: the same for each training file, with near-duplicates between the two sides.
    """

    rows: int
    held_out_rows: int
    tokens: int
    trained_tokens: int
    truncated: int
    left_out: int = 0
    near_duplicates: int = 0
    folds: int = 0
    trials: int = 0
    steps: int
    evaluations: int = 0
    read_tokens: int
    measured_tokens: int = 0
    tokens_per_second: float | None = None
    seconds: float | None = None
    measured: bool = False
    replaces: Replaces | None = None
    tasks: Sequence[TaskEstimate] = ()


class JobFailure(ApiObject):
    """Why a job failed."""

    code: str | None = None
    message: str
    param: str | None = None


class JobState(JobSettings):
    """A fine-tuning job at one moment. Hyperparameters are "auto" until the files have been read."""

    id: str
    created_at: int
    model: str
    status: JobStatus
    training_file: str
    training_files: Sequence[TrainingFile] | None = None
    validation_file: str | None = None
    method: Method | None = None
    hyperparameters: Hyperparameters = Hyperparameters()
    lora: Lora = Lora()
    adapter: AdapterSettings = AdapterSettings()
    seed: int | None = None
    name: str | None = None
    error: JobFailure | None = None
    fine_tuned_model: str | None = None
    finished_at: int | None = None
    estimated_finish: int | None = None
    trained_tokens: int | None = None
    result_files: Sequence[str] = ()
    sweep: Sweep | None = None
    sweep_results: Sequence[Trial] | None = None
    parent: str | None = None
    metadata: Mapping[str, str] | None = None
    evaluation: Evaluation | None = None
    published: Published | None = None

    @property
    def finished(self) -> bool:
        """Whether the job is over, well or not."""
        return self.status in TERMINAL


class JobEvent(ApiObject):
    """A line of a job's log; `data` carries numbers when `type` is "metrics"."""

    id: str
    created_at: int
    level: str
    message: str
    type: str | None = None
    data: Mapping[str, Any] | None = None


class Checkpoint(ApiObject):
    """A checkpoint of a job; `fine_tuned_model_checkpoint` can be asked as a model."""

    id: str
    created_at: int
    step_number: int
    fine_tuned_model_checkpoint: str
    fine_tuning_job_id: str
    metrics: CheckpointMetrics = CheckpointMetrics()


class Adapter(ApiObject):
    """A name together with the immutable version that it points at, or one of its versions."""

    id: str
    name: str
    tenant: str
    version: int | str
    digest: str
    base_model: str
    rank: int
    target_modules: Sequence[str]
    bytes: int
    created_at: int
    source: str
    method: str | None = None
    job_id: str | None = None
    parent: str | None = None
    parent_digest: str | None = None
    resident: str | None = None
    pinned: bool = False
    evaluation: Evaluation | None = None


class Tenant(ApiObject):
    """A tenant; `name` is part of its adapters' canonical names, `weight` its share of the workers beside others."""

    id: str
    name: str
    created_at: int
    weight: float = 1.0


class ApiKey(ApiObject):
    """A key of a tenant; `prefix` is the part of its secret that may be shown. Times are Unix seconds."""

    id: str
    name: str | None = None
    prefix: str
    scopes: Sequence[str]
    created_at: int
    expires_at: int | None = None
    revoked_at: int | None = None


class NewApiKey(ApiKey):
    """A key that was just made: no other answer has its `secret`."""

    secret: str
