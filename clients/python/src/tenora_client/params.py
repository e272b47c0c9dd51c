"""What a request may say, as typed keyword arguments that the sync and the async client share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Required, TypedDict

from tenora_client.settings import AdapterParams, LoraParams, MethodParams, Settings, SharedHyperparameters, SweptParams

Combination = Literal["cat", "linear", "ties", "dare_linear", "dare_ties", "svd"]


class WeightedAdapter(TypedDict, total=False):
    """An adapter of a composition, by any of its names; its weight is 1 if absent."""

    name: Required[str]
    weight: float


class MergedAdapters(TypedDict, total=False):
    """`adapters` as LoRAX has them."""

    ids: Required[Sequence[str]]
    weights: Required[Sequence[float]]
    merge_strategy: Combination
    density: float
    majority_sign_method: Literal["total", "frequency"]


class SamplingParams(TypedDict, total=False):
    """How tokens are chosen and what comes back; absent means the server's default.

    Attributes:
        adapter_id: an adapter's name, when `model` is the base or absent.
        adapters: several adapters that answer as one.
        combination: how; cat, the exact sum of what each adds, if absent.
        density: share of the weights that ties and dare keep.
        adapter_scale: from 0, the base, to 2; multiplies what the adapters, or the one adapter, add to the base.
        stop: strings before which the text ends.
        seed: equal requests with equal seeds give equal tokens.
        temperature: 0 is greedy.
        extra: further fields of the request body, sent as they are.
    """

    adapter_id: str
    adapters: Sequence[WeightedAdapter | Mapping[str, Any]]
    combination: Combination
    density: float
    majority_sign_method: Literal["total", "frequency"]
    merged_adapters: MergedAdapters | Mapping[str, Any]
    adapter_scale: float
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


class ReadingParams(TypedDict, total=False):
    """How texts are read; absent means the server's default.

    Attributes:
        adapter_id: an adapter's name, when `model` is the base or absent.
        head: which of the adapter's heads, if several will do.
        priority: lower runs earlier among one's own requests.
        extra: further fields of the request body, sent as they are.
    """

    adapter_id: str
    head: str
    priority: int
    user: str
    extra: Mapping[str, Any]


class EmbeddingParams(ReadingParams, total=False):
    """Those of embeddings: the first `dimensions` numbers, brought to length 1 again."""

    dimensions: int


class ClassifyParams(ReadingParams, total=False):
    """Those of classes: without `use_activation` the `probs` are the scores themselves."""

    use_activation: bool


class PoolParams(ReadingParams, total=False):
    """Those of pooled states: which state, instead of what a head makes of it.

    Attributes:
        pooling: of the last token, or the mean over all.
        layer: -1 is after the final norm, -2 … -4 what the layers before the last one give.
    """

    pooling: Literal["last", "mean"]
    layer: int


class Answers(TypedDict):
    """A prompt (a text, or messages), and answers to it that are each rewarded."""

    prompt: str | Sequence[Mapping[str, Any]]
    completions: Sequence[str]


class TrainingFileParams(TypedDict, total=False):
    """One of several files, a task of its own; its rows are seen `weight` times as often as those of others.

    Attributes:
        file: its id.
    """

    file: Required[str]
    weight: float
    name: str


class SweepParams(SweptParams, total=False):
    """Settings to try, of which the best becomes the result.

    Attributes:
        sampler: grid tries every point of the lists; random spreads `trials` of them evenly.
    """

    sampler: Literal["grid", "random"]
    trials: int


class JobParams(Settings, total=False):
    """What a job is made of, beside its settings. Where an object has a type here, a plain mapping does as well.

    Attributes:
        name: the name under which the adapter will be called; a name in use gets a new version.
        suffix: part of `fine_tuned_model`, at most 64 characters.
        training_files: several files instead of one.
        method: how to train.
        hyperparameters: the older place for those that all methods have.
        adapter: what the adapter is, of any type; instead of `lora`.
        lora: an adapter of low-rank terms; its `init_from` names an adapter, a version, a job's result or a checkpoint
            to start from.
        sweep: settings to try.
        extra: further fields of the request body, sent as they are.
    """

    name: str
    suffix: str
    seed: int
    metadata: Mapping[str, str]
    training_files: Sequence[TrainingFileParams | Mapping[str, Any]]
    method: MethodParams | Mapping[str, Any]
    hyperparameters: SharedHyperparameters | Mapping[str, int | float | Literal["auto"]]
    lora: LoraParams | Mapping[str, Any]
    adapter: AdapterParams | Mapping[str, Any]
    sweep: SweepParams | Mapping[str, Any]
    extra: Mapping[str, Any]
