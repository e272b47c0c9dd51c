"""The fields that chat and text completions share, and how they become the engine's SamplingParams."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from tenora.api.schemas.base import NamedModel, RequestModel, ResponseModel
from tenora.api.schemas.composition import CompositionBody
from tenora.api.schemas.fixed import Label, Metadata, ServiceTier, Store, Unsupported
from tenora.engine.messages import SamplingParams
from tenora.errors import InvalidRequestError

MAX_CHOICES = 16
MAX_LOGPROBS = 20
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def as_list(value: Any) -> Any:
    """A single string as a list of one."""
    return [value] if isinstance(value, str) else value


StopStrings = Annotated[
    list[Annotated[str, Field(min_length=1, max_length=512)]],
    Field(max_length=4),
    BeforeValidator(as_list, json_schema_input_type=str | list[str] | None),
]


class StreamOptions(RequestModel):
    """Options of a streamed answer. `include_obfuscation` is accepted for the SDK's sake and does nothing."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class GenerationBody(NamedModel, CompositionBody):
    """What chat and text completions have in common. An explicit null means the default."""

    max_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: StopStrings | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1, description="0 is greedy.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=300)
    user: Label = None
    store: Store = None
    metadata: Metadata = None
    service_tier: ServiceTier = None
    prompt_cache_key: Label = None
    prompt_cache_retention: Label = None
    prompt_cache_options: Unsupported = None
    safety_identifier: Label = None
    # as vLLM has them
    top_k: int | None = Field(default=None, ge=-1, lt=2**31, description="-1 and 0: all tokens.")
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=0.001, le=10)  # a smaller one overflows the logits
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: list[TokenId] | None = Field(default=None, max_length=64)
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = Field(default=None, description="false: special tokens show in the text.")
    prompt_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    return_tokens_as_token_ids: bool | None = Field(default=None, description="Tokens of logprobs as `token_id:5`.")
    priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="Lower runs earlier among one's own requests."
    )

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Self:
        if self.adapter_id is not None and (self.adapters or self.merged_adapters) is not None:
            raise InvalidRequestError(
                "adapter_id names one adapter, and adapters several. Send one of them.", param="adapter_id"
            )
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options needs stream: true.", param="stream_options")
        if self.stream and self.prompt_logprobs is not None:
            raise InvalidRequestError("prompt_logprobs cannot be streamed. Leave out stream.", param="prompt_logprobs")
        return self

    @property
    def choices(self) -> int:
        """How many answers are wanted."""
        return self.n or 1

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def sampling_params(self, max_tokens: int, *, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """The engine's view, with defaults filled in.

        Raises:
            InvalidRequestError: if `min_tokens` is more than `max_tokens`.
        """
        if (self.min_tokens or 0) > max_tokens:
            raise InvalidRequestError(
                f"min_tokens must be at most max_tokens, which is {max_tokens} here.", param="min_tokens"
            )
        return SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens or 0,
            # Of no probability at all, the likeliest token is what is left.
            temperature=0.0 if self.top_p == 0 else _default(self.temperature, 1.0),
            top_p=self.top_p or 1.0,
            top_k=max(0, self.top_k or 0),
            min_p=_default(self.min_p, 0.0),
            repetition_penalty=_default(self.repetition_penalty, 1.0),
            frequency_penalty=_default(self.frequency_penalty, 0.0),
            presence_penalty=_default(self.presence_penalty, 0.0),
            logit_bias=self.logit_bias or {},
            seed=self.seed,
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


class PromptTokensDetails(ResponseModel):
    """How the prompt was processed."""

    cached_tokens: int


class UsedAdapter(ResponseModel):
    """An adapter of a composition: as it was asked for, the version that this meant, and its weight, scale and all."""

    name: str
    digest: str
    weight: float


class Usage(ResponseModel):
    """Tokens of a request; the prompt counts once, however many choices. `adapters` is there if it composed some."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    adapters: list[UsedAdapter] | None = Field(default=None, exclude_if=lambda value: value is None)


class PromptLogprob(ResponseModel):
    """A token at a place of the prompt, as vLLM tells it."""

    logprob: float
    rank: int | None
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""One entry per prompt token, by token id; the first is null because nothing precedes it."""
