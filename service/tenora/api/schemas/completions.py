"""Text completions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PlainValidator, model_validator

from tenora.api.schemas.base import ResponseModel, invalid
from tenora.api.schemas.fixed import only
from tenora.api.schemas.sampling import MAX_CHOICES, MAX_LOGPROBS, GenerationBody, PromptLogprobs, Usage
from tenora.errors import InvalidRequestError

MAX_PROMPTS = 256
MAX_SEQUENCES = 512
DEFAULT_MAX_TOKENS = 16  # OpenAI's
Prompt = str | list[int]
FinishReason = Literal["stop", "length"]


def _may_be_ids(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and type(value[0]) is int


def as_prompts(value: Any, most: int = MAX_PROMPTS) -> Sequence[Prompt]:
    """A string, strings, token ids or lists of token ids as a list of prompts, of at most so many.

    Of token ids only the first is looked at: a body holds millions, which are counted and checked where prompts are
    made (`tenora.control.inference.prompts`), on other threads than this.
    """
    if isinstance(value, str) or _may_be_ids(value):
        return [value]
    if (
        isinstance(value, list)
        and 0 < len(value) <= most
        and (all(isinstance(item, str) for item in value) or all(_may_be_ids(item) for item in value))
    ):
        return value
    raise invalid(f"must be a string, token ids, or a list of at most {most} of either, none of them empty")


Prompts = Annotated[
    Sequence[Prompt], PlainValidator(as_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]])
]


class CompletionRequest(GenerationBody):
    """POST /v1/completions. With `echo` and `max_tokens: 0` the prompt alone is scored."""

    prompt: Prompts
    echo: bool | None = None
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    suffix: Annotated[Any, only("", why="Text cannot be inserted. Leave the field out.")] = Field(
        default=None, description="Not supported."
    )
    best_of: int | None = Field(default=None, ge=1, le=MAX_CHOICES, description="As many as `n`: all are returned.")

    @model_validator(mode="after")
    def _prompts_fit(self) -> Self:
        if len(self.prompt) * self.choices > MAX_SEQUENCES:
            raise InvalidRequestError(
                f"Prompts times n must be at most {MAX_SEQUENCES}. Send fewer prompts.", param="n"
            )
        if self.best_of not in {None, self.choices}:
            raise InvalidRequestError(
                "Answers are not ranked: best_of must equal n. Leave the field out.",
                code="unsupported_parameter",
                param="best_of",
            )
        if self.max_tokens == 0 and not self.echo:
            raise InvalidRequestError("max_tokens must be at least 1 unless echo is true.", param="max_tokens")
        if self.stream and self.echo and self.logprobs is not None:
            raise InvalidRequestError("echo with logprobs cannot be streamed. Leave out stream.", param="echo")
        return self

    @property
    def token_limit(self) -> int:
        """The most tokens to generate."""
        return DEFAULT_MAX_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompt_alternatives(self) -> int | None:
        """Alternatives per prompt token that the engine must give: for `prompt_logprobs`, or for echo with logprobs."""
        wanted = [self.prompt_logprobs, self.logprobs if self.echo else None]
        return max((count for count in wanted if count is not None), default=None)


class CompletionLogprobs(ResponseModel):
    """Log-probabilities in OpenAI's older shape: four lists of equal length. The first token of a prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(ResponseModel):
    """One generated text. `finish_reason` is null only in a stream, before the end."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=lambda value: value is None)


class Completion(ResponseModel):
    """The answer of POST /v1/completions, and each event of a streamed one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = Field(default=None, exclude_if=lambda value: value is None)
