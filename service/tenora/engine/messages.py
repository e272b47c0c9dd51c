"""What crosses the sockets between an engine and its clients: msgspec structs, never pickles. Free of torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from tenora.adapters.ref import AdapterRef
from tenora.model.sampling import FinishReason, SamplingParams, TokenLogprob
from tenora.training.commands import RunCommand
from tenora.training.events import TrainEvent
from tenora.training.spec import SessionSpec, TrainSpec

__all__ = ["FinishReason", "SamplingParams", "TokenLogprob"]  # handed on with the messages that carry them

Pooling = Literal["last", "mean"]

# ---- clients → engine ---------------------------------------------------------------------------------------------


class Generate(msgspec.Struct, frozen=True, kw_only=True, tag="generate"):
    """Start a sequence.

    Attributes:
        adapter: None is the base model.
        share_group: opaque name (the control plane uses the tenant).
        weight: its share beside the others'; the latest request's value holds.
        cache_salt: prefix-cache namespace made by the server; hits never cross it.
        priority: lower runs earlier within the share group; ties by arrival.
    """

    request_id: str
    token_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    share_group: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    priority: int = 0


class Pool(msgspec.Struct, frozen=True, kw_only=True, tag="pool"):
    """Start a sequence that ends with its prompt and answers with what becomes of the prompt's hidden states.

    Attributes:
        layer: -1 is after the final norm, -2 … -4 what the layers before the last one give, not normalised.
        pooling: the state of the last token, or the mean over all tokens.
        head: rows [start, stop) of the adapter's heads, whose scores of the pooled state are wanted; None: the state.

    The others are as of `Generate`.
    """

    request_id: str
    token_ids: list[int]
    layer: int = -1
    pooling: Pooling = "last"
    head: tuple[int, int] | None = None
    adapter: AdapterRef | None = None
    share_group: str = ""
    weight: float = 1.0
    cache_salt: str = ""
    priority: int = 0


class Abort(msgspec.Struct, frozen=True, tag="abort"):
    """Stop a sequence; no further output follows. Unknown ids are ignored (it may have ended meanwhile)."""

    request_id: str


class StartTraining(msgspec.Struct, frozen=True, tag="train"):
    """Start or, if `spec.workdir` holds state, resume a run."""

    spec: TrainSpec


class StartSession(msgspec.Struct, frozen=True, tag="start_session"):
    """Start a run that does what it is told, or resume it if `spec.workdir` holds its state."""

    spec: SessionSpec


class PutCommand(msgspec.Struct, frozen=True, tag="put"):
    """Tell a run to do something. Its answer is a `Training` event; commands are carried out in the order they came."""

    run_id: str
    command: RunCommand


class Acknowledge(msgspec.Struct, frozen=True, tag="acknowledge"):
    """Of a run's `Recorded` events since it was started, those of a RetoldEvent too, the first `count` are recorded."""

    run_id: str
    count: int


class StopTraining(msgspec.Struct, frozen=True, tag="stop_training"):
    """End a run: `pause` saves its state for a later StartTraining, otherwise it is cancelled."""

    run_id: str
    pause: bool = False


class PinAdapter(msgspec.Struct, frozen=True, tag="pin"):
    """Load the adapter if need be and keep (or no longer keep) its slot."""

    adapter: AdapterRef
    pinned: bool = True


class EvictAdapter(msgspec.Struct, frozen=True, tag="evict"):
    """The version was deleted: free slot, host copy and cached prefixes once no sequence uses it."""

    digest: str


class ForgetPrefixes(msgspec.Struct, frozen=True, tag="forget_prefixes"):
    """Whoever a prefix-cache namespace was for is gone: nothing of it is found or remembered again."""

    cache_salt: str


class Shutdown(msgspec.Struct, frozen=True, tag="shutdown"):
    """Save the state of running jobs and exit. Sequences still running are failed with `engine_shutdown`."""


Command = (
    Generate
    | Pool
    | Abort
    | StartTraining
    | StartSession
    | PutCommand
    | Acknowledge
    | StopTraining
    | PinAdapter
    | EvictAdapter
    | ForgetPrefixes
    | Shutdown
)

# ---- engine → clients ---------------------------------------------------------------------------------------------


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True, tag="out"):
    """New tokens of one sequence. The last one has a finish_reason; a stop token itself is not in token_ids.

    Attributes:
        cached_tokens: prompt tokens that came from the prefix cache (on the first output only, else 0).
        prompt_logprobs: on the first output if asked for; None before `prompt_logprobs_from`.
        stop_token_id: the stop token that ended it, if one did.
        queue_seconds: how long it waited before the engine began with it (on the first output only).
        pooled: the answer to a `Pool`, float32 in the machine's order of bytes; its only output has it.
    """

    request_id: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    queue_seconds: float | None = None
    pooled: bytes | None = None


class SequenceFailed(msgspec.Struct, frozen=True, kw_only=True, tag="seq_failed"):
    """The sequence ended with an error.

    `code`: invalid_request, context_length_exceeded; of the adapter invalid_adapter, adapter_too_large,
    adapter_overflow, adapter_damaged, adapters_pinned, adapters_do_not_compose; and, which pass by themselves,
    adapter_unavailable, out_of_memory, engine_error, engine_shutdown.
    """

    request_id: str
    code: str
    message: str


class Training(msgspec.Struct, frozen=True, tag="training"):
    """An event of a training run."""

    event: TrainEvent


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Counters since start and gauges of now; the API turns them into metrics."""

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    prefix_queries: int = 0  # tokens looked up
    prefix_hits: int = 0  # tokens found
    preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    adapter_slots: int = 0
    adapters_resident: tuple[str, ...] = ()  # digests on the device
    adapters_running: tuple[str, ...] = ()
    adapters_waiting: tuple[str, ...] = ()
    adapter_loads: int = 0
    adapter_load_seconds: float = 0.0
    adapter_load_failures: int = 0
    adapter_evictions: int = 0
    training_runs: int = 0
    trained_tokens: int = 0
    steps: int = 0


class Heartbeat(msgspec.Struct, frozen=True, kw_only=True, tag="heartbeat"):
    """Sent by the step loop at least once a second, idle or busy; its absence means the loop hangs.

    Attributes:
        others: sequences of other clients than the one that hears it.
    """

    stats: EngineStats
    others: int = 0


LoadingPhase = Literal["weights", "kernels"]


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """How far the engine is on its way to `Ready`; the API's patience begins anew with each one.

    Attributes:
        phase: what it does: reads the base's weights, or compiles the CPU's kernels.
        done: numbers of the weights, or kernels; total: of as many, 0 if that is not known.
        found: how many of the done kernels were in the cache on disk, left there by an earlier start.
    """

    phase: LoadingPhase
    done: int
    total: int
    found: int = 0


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The base is loaded. Sent once, and only `Loading` before it.

    Attributes:
        hidden_size: numbers of a hidden state.
    """

    device: str
    dtype: str
    max_model_len: int
    hidden_size: int = 0
    kv_blocks: int
    block_size: int
    kv_cache_bytes: int = 0
    adapter_pool_bytes: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    adapter_slots: int = 0
    target_modules: tuple[str, ...]

    @property
    def memory(self) -> dict[str, int]:
        """How memory was shared out and what follows from it, by name."""
        names = ("block_size", "kv_cache_bytes", "adapter_pool_bytes", "max_num_seqs", "max_num_batched_tokens")
        return {name: getattr(self, name) for name in names}


class StartFailed(msgspec.Struct, frozen=True, tag="start_failed"):
    """The base could not be loaded; the process exits."""

    code: str
    message: str


class Outputs(msgspec.Struct, frozen=True, tag="outputs"):
    """Everything one step produced, in one frame."""

    items: list[SequenceOutput | SequenceFailed]


Event = Outputs | Training | Heartbeat | Loading | Ready | StartFailed | PinAdapter | EvictAdapter
"""The last two tell the owner what another client asked for, so that it can say it to the engine's successor."""
