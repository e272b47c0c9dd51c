"""Embeddings, classes, pooled states and rewards: what is made of a text's hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, Self

from pydantic import Discriminator, Field, PlainValidator, Tag, model_validator

from tenora.api.schemas.base import NamedModel, RequestModel, ResponseModel
from tenora.api.schemas.chat import MAX_MESSAGES, Message, TextPart
from tenora.api.schemas.completions import Prompt, as_prompts
from tenora.api.schemas.fixed import Label
from tenora.errors import InvalidRequestError

MAX_INPUTS = 2048  # OpenAI's
DEEPEST_LAYER = -4
Encoding = Literal["float", "base64"]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
Inputs = Annotated[
    Sequence[Prompt],
    PlainValidator(
        partial(as_prompts, most=MAX_INPUTS), json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
]


class PoolingBody(NamedModel):
    """What the four calls have in common."""

    head: str | None = Field(
        default=None, max_length=256, description="Which of the adapter's heads, if several will do."
    )
    user: Label = None
    priority: int | None = Field(
        default=None, ge=-1000, le=1000, description="Lower runs earlier among one's own requests."
    )


class EmbeddingRequest(PoolingBody):
    """POST /v1/embeddings, as OpenAI has it."""

    input: Inputs
    encoding_format: Encoding | None = None
    dimensions: int | None = Field(
        default=None, ge=1, description="The first so many numbers, brought to length 1 again."
    )


class TextOrConversation(PoolingBody):
    """What vLLM's calls read: texts, or one conversation through the chat template."""

    input: Inputs | None = None
    messages: Messages | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.input is None) == (self.messages is None):
            raise InvalidRequestError(
                "Send either input, a text or several, or messages, a conversation.",
                code="missing_required_parameter" if self.input is None else None,
                param="input",
            )
        return self


class ClassifyRequest(TextOrConversation):
    """POST /classify, as vLLM has it."""

    use_activation: bool | None = Field(default=None, description="false: `probs` are the scores themselves.")


class PoolingRequest(TextOrConversation):
    """POST /pooling, as vLLM has it. `pooling` or `layer` ask for the hidden state even where there is a head."""

    encoding_format: Encoding | None = None
    pooling: Literal["last", "mean"] | None = Field(
        default=None, description="The state of the last token, or the mean over all; last unless said."
    )
    layer: int | None = Field(
        default=None,
        ge=DEEPEST_LAYER,
        le=-1,
        description="-1 is after the final norm, -2 … -4 what the layers before the last one give.",
    )

    @model_validator(mode="after")
    def _a_head_says_what_it_reads(self) -> Self:
        if self.head is not None and (self.pooling is not None or self.layer is not None):
            raise InvalidRequestError(
                "A head says itself what it reads. Leave out head, or pooling and layer.", param="head"
            )
        return self


class Answers(RequestModel):
    """A prompt, and answers to it that are each rewarded."""

    prompt: Annotated[str, Field(min_length=1)] | Messages
    completions: list[str] = Field(min_length=1, max_length=MAX_INPUTS)

    @property
    def read(self) -> Sequence[str | list[Message]]:
        """Each answer after the prompt: one text, or a conversation that ends with it."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt + completion for completion in self.completions]
        said = (Message(role="assistant", content=[TextPart(type="text", text=text)]) for text in self.completions)
        return [[*prompt, message] for message in said]


def _shape(value: Any) -> str | None:
    """Which of the three a reward's input is, so that an error names its place in that one alone.

    In parentheses, as pydantic writes the branches of a union, which no error's place tells (`tenora.api.errors`).
    """
    if isinstance(value, dict | Answers):
        return "(answers)"
    first = value[0] if isinstance(value, list) and value else None
    return "(conversations)" if isinstance(first, list) else "(messages)" if isinstance(first, dict | Message) else None


class RewardRequest(PoolingBody):
    """POST /v1/rewards. A prompt that is text and its completion are read as one text."""

    input: Annotated[
        Annotated[Messages, Tag("(messages)")]
        | Annotated[Annotated[list[Messages], Field(max_length=MAX_INPUTS)], Tag("(conversations)")]
        | Annotated[Answers, Tag("(answers)")],
        Discriminator(
            _shape,
            custom_error_type="invalid_value",
            custom_error_message="must be messages, a list of conversations, or an object with prompt and completions",
        ),
    ]

    @property
    def inputs(self) -> Sequence[str | list[Message]]:
        """What is read, one after the other: texts and conversations."""
        given = self.input
        if isinstance(given, Answers):
            return given.read
        conversations = [part for part in given if isinstance(part, list)]
        return conversations or [[part for part in given if isinstance(part, Message)]]


class PoolingUsage(ResponseModel):
    """Tokens of all inputs."""

    prompt_tokens: int
    total_tokens: int


class Embedding(ResponseModel):
    """One input's. Base64 is of float32 numbers, the least significant byte first."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class Embeddings(ResponseModel):
    """The answer of POST /v1/embeddings."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: PoolingUsage


class Classification(ResponseModel):
    """One input's likeliest label, and the probability of each in the order of `labels`."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class Classifications(ResponseModel):
    """The answer of POST /classify."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    head: str
    labels: list[str]
    multi_label: bool
    data: list[Classification]
    usage: PoolingUsage


class PooledData(ResponseModel):
    """One input's pooled state, or what the head makes of it."""

    index: int
    object: Literal["pooling"] = "pooling"
    data: list[float] | str


class PoolingAnswer(ResponseModel):
    """The answer of POST /pooling. `head` is null where the data are hidden states."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    head: str | None
    data: list[PooledData]
    usage: PoolingUsage


class Reward(ResponseModel):
    """One answer's score, and the same in standard deviations from the mean that training measured."""

    index: int
    score: float
    normalized: float


class Rewards(ResponseModel):
    """The answer of POST /v1/rewards."""

    object: Literal["list"] = "list"
    model: str
    head: str
    data: list[Reward]
    usage: PoolingUsage
