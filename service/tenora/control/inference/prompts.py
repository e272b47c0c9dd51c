"""Prompts as token ids, each of its limits looked at before the work that it bounds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tenora.control.inference.records import Conversation, Prompt
from tenora.errors import ContextLengthError, InvalidRequestError

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Prompts:
    """Makes prompts of conversations, texts and token ids. This takes time in proportion to the text.

    Attributes:
        longest: the most tokens that a prompt may have.
        param: the field that has texts and token ids.
    """

    tokenizer: Tokenizer
    longest: int
    param: str = "prompt"

    def of(self, prompt: Prompt) -> list[int]:
        """Any prompt as token ids; see the three others."""
        if isinstance(prompt, Conversation):
            return self.chat(prompt.messages, answer=not prompt.whole)
        return self.text(prompt) if isinstance(prompt, str) else self.ids(prompt)

    def chat(
        self, messages: Sequence[Mapping[str, Any]], tools: list[Any] | None = None, *, answer: bool = True
    ) -> list[int]:
        """The conversation through the base's chat template, as token ids, ready for the assistant's answer.

        Contents are strings or lists of text parts. With `answer` false nothing follows the last message.

        Raises:
            ContextLengthError: it does not fit.
            InvalidRequestError: the template refuses it, or makes nothing of it.
        """
        rendered = self.tokenizer.render_chat(
            [{**message, "content": _flat(message.get("content"))} for message in messages],
            add_generation_prompt=answer,
            tools=tools,
        )
        return self._encoded(rendered, "messages", add_special_tokens=False)

    def text(self, prompt: str) -> list[int]:
        """A text prompt as token ids, with the special tokens that the tokenizer puts before a text.

        Raises:
            ContextLengthError: it does not fit.
            InvalidRequestError: it is empty.
        """
        return self._encoded(prompt, self.param, add_special_tokens=True)

    def ids(self, ids: Sequence[int]) -> list[int]:
        """Ids that a client sent, whatever they are: they are counted before one is looked at.

        Raises:
            ContextLengthError: there are too many.
            InvalidRequestError: there are none, or one is not of the vocabulary.
        """
        self._fits(len(ids), self.param)
        if not set(map(type, ids)) <= {int}:
            raise InvalidRequestError("A prompt of token ids must hold nothing but whole numbers.", param=self.param)
        self.check_ids(ids, self.param)
        return self._some(ids, self.param)

    def check_ids(self, ids: Collection[int], param: str) -> None:
        """Raise InvalidRequestError naming `param` if one of the ids is not of the vocabulary."""
        size = self.tokenizer.vocab_size
        if ids and not 0 <= min(ids) <= max(ids) < size:
            wrong = next(token_id for token_id in ids if not 0 <= token_id < size)
            raise InvalidRequestError(f"The token id {wrong} is not below the vocabulary's size {size}.", param=param)

    def _encoded(self, text: str, param: str, *, add_special_tokens: bool) -> list[int]:
        self._fits(self.tokenizer.least_tokens(text, self.longest), param, "at least ")
        ids = self.tokenizer.encode(text, add_special_tokens=add_special_tokens)
        self._fits(len(ids), param)
        return self._some(ids, param)

    def _fits(self, tokens: int, param: str, about: str = "") -> None:
        if tokens > self.longest:
            raise ContextLengthError(
                f"The model's context holds {self.longest} tokens; the prompt has {about}{tokens}. Shorten it.",
                param=param,
            )

    @staticmethod
    def _some(ids: Sequence[int], param: str) -> list[int]:
        if not ids:
            raise InvalidRequestError("The prompt is empty; send at least one token of it.", param=param)
        return list(ids)


def _flat(content: Any) -> str:
    """A message's content as one string; templates of text models take nothing else."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in content]
    if not all(isinstance(part, str) for part in parts):
        raise InvalidRequestError("A message's content must be a string or a list of text parts.", param="messages")
    return "".join(part for part in parts if part)
