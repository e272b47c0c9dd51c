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
        hyperparameters: n_epochs, batch_size, learning_rate_multiplier, each a number or "auto".
        method: `{"type": "supervised", ...}`.
        lora: rank, alpha, dropout, target_modules (a list or "all-linear"), use_rslora.
        training: learning_rate, scheduler, warmup_ratio, weight_decay, max_grad_norm, max_seq_length, eval_interval,
            truncate.
        extra: further fields of the request body, sent as they are.
    """

    name: str
    suffix: str
    seed: int
    metadata: Mapping[str, str]
    hyperparameters: Mapping[str, int | float | Literal["auto"]]
    method: Mapping[str, Any]
    lora: Mapping[str, Any]
    training: Mapping[str, Any]
    extra: Mapping[str, Any]
