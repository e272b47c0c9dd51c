"""The k-shot prompt: training rows put before a held-out row, as turns of the same conversation or as text."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from tenora.data.dataset import TokenizedDataset
from tenora.data.encoding import end_of_text

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

_CONTENT = "xyzzy"  # in place of a message's text, to see what a template writes around it
_BETWEEN = "\n\n"  # completions


@dataclass(frozen=True, slots=True)
class Prompted:
    """A held-out row behind its shots.

    Attributes:
        row: its index in the held-out set.
        tokens: all of it.
        learned: the places of the row's learned tokens among them.
    """

    row: int
    tokens: list[int]
    learned: list[int]


def few_shot_prompts(
    tokenizer: Tokenizer,
    train: TokenizedDataset,
    held_out: TokenizedDataset,
    *,
    same: bool,
    shots: int,
    max_length: int,
    seed: int,
) -> Iterator[Prompted]:
    """Held-out rows 0, 1, … each behind the same few training rows, drawn by `seed`.

    Args:
        same: the held-out rows are the training rows; a row is then never its own shot.
        shots: training rows before each.
        max_length: tokens of the whole; rows that do not fit are left out.
    """
    joiner = _Joiner.of(tokenizer)
    order = np.random.default_rng(seed).permutation(len(train))[: shots + 1].tolist()
    for index in range(len(held_out)):
        chosen = [row for row in order if not (same and row == index)][:shots]
        if len(chosen) < shots:
            return
        before: list[int] = []
        for row in chosen:
            before += joiner.part(*train.row(row), first=not before, last=False)
        own, weights = held_out.row(index)
        part = joiner.part(own, weights, first=not before, last=True)
        shift = len(before) + len(part) - len(own)
        tokens = before + part
        if len(tokens) <= max_length:
            yield Prompted(index, tokens, [int(place) + shift for place in np.flatnonzero(weights)])


@dataclass(frozen=True, slots=True)
class _Joiner:
    """Puts tokenized rows one after the other, so that the base reads on.

    What every text of this base begins with (a bos, the template's own system message) stands once, and between
    completions the end-of-text token gives way to an empty line.

    Attributes:
        text_opening, chat_opening: what a plain text, and a conversation, begins with.
        asking: what a template writes before an answer; "" if there is none.
        end: the token that ends a completion.
        between: tokens that take its place.
    """

    tokenizer: Tokenizer
    text_opening: list[int]
    chat_opening: list[int]
    asking: str
    end: int
    between: list[int]

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> _Joiner:
        opening, asking = "", ""
        if tokenizer.has_chat_template:
            opening, asking = _opening(tokenizer), _asking(tokenizer)
        return cls(
            tokenizer,
            text_opening=tokenizer.encode("", add_special_tokens=True),
            chat_opening=tokenizer.encode(opening),
            asking=asking,
            end=end_of_text(tokenizer),
            between=tokenizer.encode(_BETWEEN),
        )

    def part(self, row: npt.NDArray[np.int32], weights: npt.NDArray[np.uint8], *, first: bool, last: bool) -> list[int]:
        """What of a row goes into the prompt."""
        tokens: list[int] = row.tolist()
        chat = self._is_chat(tokens, weights)
        opening = self.chat_opening if chat else self.text_opening
        if not first and tokens[: len(opening)] == opening:
            tokens = tokens[len(opening) :]
        if not (chat or last) and tokens[-1] == self.end:
            tokens = tokens[:-1] + self.between
        return tokens

    def _is_chat(self, tokens: list[int], weights: npt.NDArray[np.uint8]) -> bool:
        """Whether the first learned token stands where a template lets an answer begin."""
        before = self.tokenizer.decode(tokens[: int(weights.argmax())], skip_special_tokens=False)
        return bool(self.asking) and before.rstrip().endswith(self.asking)


def _opening(tokenizer: Tokenizer) -> str:
    """What the template writes before the first message of every conversation."""
    turn = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}]
    one, two = (tokenizer.render_chat(turn * times, add_generation_prompt=False) for times in (1, 2))
    opening = one[: len(one) - (len(two) - len(one))]
    return opening if two == opening + one[len(opening) :] * 2 else ""


def _asking(tokenizer: Tokenizer) -> str:
    """What the template writes between a user's message and the answer."""
    asked = tokenizer.render_chat([{"role": "user", "content": _CONTENT}], add_generation_prompt=True)
    return asked.rpartition(_CONTENT)[2].strip()
