"""What the control plane hands out: frozen records and the requests it takes. Times are Unix seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import msgspec

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import SamplingParams
from tenora.errors import PermissionDeniedError

T = TypeVar("T")
Scope = Literal["infer", "train", "adapters", "admin"]
SCOPES: tuple[Scope, ...] = ("infer", "train", "adapters", "admin")
JobStatus = Literal["validating_files", "queued", "running", "paused", "succeeded", "failed", "cancelled"]
Publish = Literal["always", "if_better", "never"]
USUAL_PUBLISH: Publish = "if_better"
TERMINAL: frozenset[JobStatus] = frozenset({"succeeded", "failed", "cancelled"})
SETTINGS = (
    *("learning_rate", "scheduler", "warmup_ratio", "weight_decay", "max_grad_norm", "max_seq_length", "max_steps"),
    *("truncate", "packing", "eval_interval", "early_stopping"),
    *("publish", "min_gain"),
)
"""Fields of a job that belong to no other object."""


@dataclass(frozen=True, slots=True)
class Principal:
    """Who is calling: a tenant, through one key. `admin` implies every scope."""

    tenant_id: str
    tenant: str
    key_id: str
    scopes: frozenset[str]

    def require(self, scope: Scope) -> None:
        """Raise PermissionDeniedError unless the key carries `scope`."""
        if scope not in self.scopes and "admin" not in self.scopes:
            raise PermissionDeniedError(
                f"This key lacks the scope {scope!r}. Use a key that has it, or create one with "
                f"`tenora keys create --tenant {self.tenant} --scope {scope}`."
            )


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing."""

    items: Sequence[T]
    has_more: bool


@dataclass(frozen=True, slots=True)
class TenantRecord:
    """A tenant. `name` follows the adapter-name pattern and is part of canonical adapter names."""

    id: str
    name: str
    created_at: int


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """An API key without its secret; `prefix` is the part that may be shown."""

    id: str
    tenant_id: str
    name: str | None
    prefix: str
    scopes: frozenset[str]
    created_at: int
    expires_at: int | None
    revoked_at: int | None


@dataclass(frozen=True, slots=True)
class FileRecord:
    """An uploaded file.

    `status`: uploaded (not a training file), processed (usable) or error (`status_details` says why).
    """

    id: str
    tenant_id: str
    bytes: int
    created_at: int
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    expires_at: int | None
    sha256: str


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
        sweep: values to try; see `tenora.control.sweeps`.
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
        sweep_results: a row per trial, with the keys of `tenora.control.sweeps.TRIAL_COLUMNS`.
        parent, parent_digest: name and digest of the adapter that it started from.
        published: what became of the result, as `tenora.control.takeover.Published`.
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


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An alias of a tenant together with the immutable version that it points at."""

    id: str
    tenant_id: str
    tenant: str
    name: str
    version: int  # 1, 2, … per alias
    digest: str
    base_model: str
    method: str  # "lora"
    rank: int
    target_modules: Sequence[str]
    bytes: int
    created_at: int
    source: Literal["job", "upload"]
    job_id: str | None
    parent: str  # what it was trained from: another adapter, or the base
    parent_digest: str | None
    resident: Literal["device", "host", "disk"]
    pinned: bool
    evaluation: Mapping[str, Any] | None
    active: bool  # the alias points at this version
    fine_tuned_model: str | None = None  # ft:… of the job that made it


@dataclass(frozen=True, slots=True)
class ModelCard:
    """An entry of /v1/models. `parent` is None for the base."""

    id: str
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int


@dataclass(frozen=True, slots=True)
class Target:
    """What a model name resolves to. `name` is what was asked for and is echoed; `adapter` None is the base."""

    name: str
    adapter: AdapterRef | None
    tenant_id: str
    cache_salt: str


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """A token in text form: `logprob` natural log, `top` best first.

    Attributes:
        offset: of a generated token, the character of the generated text at which it begins; the parts of a character
            all begin at it.
    """

    token_id: int
    token: str
    bytes: Sequence[int]
    logprob: float
    top: Sequence[tuple[int, str, Sequence[int], float]] = ()
    offset: int = 0


class Delta(msgspec.Struct, frozen=True, kw_only=True):  # made for each token, five times as fast as a dataclass
    """New text of one choice. The last one of a choice has a finish_reason.

    Attributes:
        prompt_tokens, cached_tokens: on every delta, for usage.
        completion_tokens: generated so far by this choice, what `usage` bills.
        prompt_logprobs: on the first delta if asked for.
        queue_seconds: on every delta, how long the request waited for the engine to begin with it; None if unknown.
    """

    index: int
    text: str
    token_ids: Sequence[int]
    logprobs: Sequence[LogprobEntry] | None
    prompt_logprobs: Sequence[LogprobEntry | None] | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: int | str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """One prompt, already tokenized, to be completed `n` times.

    Attributes:
        sampling: `max_tokens` None means as many as the context holds.
        stop: stop strings; the text ends before the first match (after it with `include_stop`).
        ignore_eos: the model's own end tokens end nothing.
        skip_special_tokens: they are left out of the text.
        at_once: each token is wanted as soon as it is there; else several may come as one delta, which costs less.
    """

    target: Target
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    n: int = 1
    stop: Sequence[str] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: int = 0
    at_once: bool = True
