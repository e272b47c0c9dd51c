"""What a request may say, as typed keyword arguments that the sync and the async client share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

from tenora_client.settings import Settings


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


class JobParams(Settings, total=False):
    """What a job is made of, beside its settings.

    Attributes:
        name: the name under which the adapter will be called; a name in use gets a new version.
        suffix: part of `fine_tuned_model`, at most 64 characters.
        training_files: several files instead of one: objects of file (an id), weight and name, each a task of its own.
        method: `{"type": <MethodName>, <type>: {"hyperparameters": {...}}}`.
        hyperparameters: the older place for those that all methods have.
        lora: rank, alpha, dropout, target_modules (a list or "all-linear"), use_rslora; init_from names an adapter,
            a version, a job's result or a checkpoint to start from.
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
    lora: Mapping[str, Any]
    sweep: Mapping[str, Any]
    extra: Mapping[str, Any]
