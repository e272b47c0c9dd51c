"""Chat completions."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from tenora.api.schemas.base import RequestModel, ResponseModel, invalid
from tenora.api.schemas.fixed import (
    Annotations,
    ClientTemplate,
    Modalities,
    TemplateArguments,
    TextFormat,
    ToolCalls,
    ToolChoice,
    Tools,
    Unsupported,
)
from tenora.api.schemas.sampling import MAX_LOGPROBS, GenerationBody, PromptLogprobs, Usage
from tenora.errors import InvalidRequestError

MAX_MESSAGES = 2048
FinishReason = Literal["stop", "length"]


class TextPart(RequestModel):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


def _as_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(RequestModel):
    """One turn of the conversation. The nulls are what the SDK sends back of an earlier answer."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: (
        Annotated[
            list[TextPart],
            Field(max_length=256),
            BeforeValidator(_as_parts, json_schema_input_type=str | list[TextPart] | None),
        ]
        | None
    ) = None
    name: str | None = Field(default=None, max_length=64)
    tool_call_id: str | None = Field(default=None, max_length=64)
    tool_calls: ToolCalls = Field(default=None, description="Not supported yet, but for [].")
    function_call: None = None
    refusal: None = None
    audio: None = None
    annotations: Annotations = None

    @model_validator(mode="after")
    def _content_is_there(self) -> Self:
        if self.content is None and self.role != "assistant":
            raise invalid("a message needs content: a string or a list of text parts")
        return self

    def for_template(self) -> dict[str, Any]:
        """What the chat template sees. Text parts are joined with line ends, as vLLM joins them."""
        turn: dict[str, Any] = {
            "role": "system" if self.role == "developer" else self.role,
            "content": "\n".join(part.text for part in self.content or ()),
        }
        if self.name is not None:
            turn["name"] = self.name
        if self.tool_call_id is not None:
            turn["tool_call_id"] = self.tool_call_id
        return turn


class ChatCompletionRequest(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1, lt=2**31, description="Wins over max_tokens.")
    max_tokens: int | None = Field(default=None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    tools: Tools = Field(default=None, description="Not supported yet, but for [].")
    tool_choice: ToolChoice = Field(default=None, description='Not supported yet, but for "none".')
    functions: Tools = Field(default=None, description="Not supported, but for [].")
    function_call: ToolChoice = Field(default=None, description='Not supported, but for "none".')
    response_format: TextFormat = Field(default=None, description='Not supported yet, but for {"type": "text"}.')
    chat_template: ClientTemplate = Field(default=None, description="Refused.")
    chat_template_kwargs: TemplateArguments = Field(default=None, description="Refused, but for {}.")
    parallel_tool_calls: bool | None = Field(default=None, description="Accepted and not used.")
    verbosity: Literal["low", "medium", "high"] | None = Field(default=None, description="Accepted and not used.")
    modalities: Modalities = None
    audio: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    web_search_options: Unsupported = None

    @model_validator(mode="after")
    def _logprobs_fit(self) -> Self:
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        return self

    @property
    def token_limit(self) -> int | None:
        """The most tokens to generate; None is as many as the context holds."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def alternatives(self) -> int | None:
        """Alternatives per token, 0 for the chosen token alone, None without logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None


class TopLogprob(ResponseModel):
    """A token that could have stood there."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A generated token and its alternatives, best first."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseModel):
    """Log-probabilities of the content's tokens."""

    content: list[TokenLogprob]
    refusal: None = None


class ChatMessage(ResponseModel):
    """The generated turn."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(ResponseModel):
    """One generated answer. `stop_reason` is the stop string or token that ended it, if one did."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class ChatCompletion(ResponseModel):
    """The answer of POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = Field(default=None, exclude_if=lambda value: value is None)


class ChunkChoice(ResponseModel):
    """New text of one choice; `delta` has role, content, or nothing at the end."""

    index: int
    delta: dict[str, str]
    logprobs: ChatLogprobs | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class ChatChunk(ResponseModel):
    """An event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | None = Field(default=None, exclude_if=lambda value: value is None)
