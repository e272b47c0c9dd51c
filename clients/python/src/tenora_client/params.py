"""What a request may say, as typed keyword arguments that the sync and the async client share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict


class SamplingParams(TypedDict, total=False):
    """How tokens are chosen and what comes back; absent means the server's default.

    Attributes:
        adapter_id: an adapter's name, when `model` is the base or absent.
        stop: strings before which the text ends.
        seed: equal requests with equal seeds give equal tokens.
        temperature: 0 is greedy.
        extra: further fields of the request body, sent as they are.
    """

    adapter_id: str
    max_tokens: int
    min_tokens: int
    n: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    seed: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: Mapping[str, float]
    prompt_logprobs: int
    priority: int
    user: str
    stream_options: Mapping[str, Any]
    extra: Mapping[str, Any]


class ChatParams(SamplingParams, total=False):
    """Those of a chat completion."""

    max_completion_tokens: int
    logprobs: bool
    top_logprobs: int


class CompletionParams(SamplingParams, total=False):
    """Those of a text completion; `logprobs` is a number here, as in OpenAI's."""

    echo: bool
    logprobs: int


class JobParams(TypedDict, total=False):
    """How a job trains; absent means the server's default, which is meant to work.

    Attributes:
        name: the name under which the adapter will be called; a name in use gets a new version.
        suffix: part of `fine_tuned_model`, at most 64 characters.
        training_files: several files instead of one: objects of file (an id), weight and name, each a task of its own.
        method: `{"type": "supervised" or "dpo", <type>: {"hyperparameters": {...}}}`; those of DPO have a beta.
        hyperparameters: n_epochs, batch_size, learning_rate_multiplier, each a number or "auto".
        n_epochs, batch_size: the same two by themselves.
        lora: rank, alpha, dropout, target_modules (a list or "all-linear"), use_rslora; init_from names an adapter,
            a version, a job's result or a checkpoint to start from.
        learning_rate: peak of the schedule, instead of a multiplier.
        max_seq_length: tokens of a row; longer ones are refused, or cut with `truncate`.
        max_steps: optimizer steps, instead of epochs.
        packing: False gives each row a pass of its own.
        eval_interval: optimizer steps between evaluations; 0 is once an epoch.
        early_stopping: end after so many evaluations without a better one; True is 3, False never does.
        publish: whether `name` shall mean the result: "if_better" (the default) than what it means, "always", "never".
        min_gain: with "if_better": by how many nats per learned token (per pair of DPO) it must be better.
        sweep: values of rank, learning_rate, n_epochs and batch_size to try, each a list or an object of min, max and
            log; with `sampler` ("grid" or "random") and `trials`.
        extra: further fields of the request body, sent as they are.
    """

    name: str
    suffix: str
    seed: int
    metadata: Mapping[str, str]
    training_files: Sequence[Mapping[str, Any]]
    method: Mapping[str, Any]
    hyperparameters: Mapping[str, int | float | Literal["auto"]]
    n_epochs: int | Literal["auto"]
    batch_size: int | Literal["auto"]
    lora: Mapping[str, Any]
    learning_rate: float
    scheduler: Literal["linear", "cosine", "constant"]
    warmup_ratio: float
    weight_decay: float
    max_grad_norm: float
    max_seq_length: int
    max_steps: int
    truncate: bool
    packing: bool
    eval_interval: int
    early_stopping: bool | int
    publish: Literal["always", "if_better", "never"]
    min_gain: float
    sweep: Mapping[str, Any]
    extra: Mapping[str, Any]
