"""A prompt as it is repeated before what follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Echo:
    """A prompt as text.

    Attributes:
        first: its first token, which has no log-probability: id, text and bytes.
        offsets: the character at which each token begins, where log-probabilities are wanted.
    """

    text: str
    first: tuple[int, str, Sequence[int]]
    offsets: Sequence[int]


def echo_of(tokenizer: Tokenizer, prompt: str | Sequence[int], ids: Sequence[int], *, offsets: bool) -> Echo:
    """What is repeated of a prompt, whose tokens are `ids`."""
    first = (ids[0], tokenizer.token_text(ids[0]), tokenizer.token_bytes(ids[0]))
    text = prompt if isinstance(prompt, str) else tokenizer.decode(ids, skip_special_tokens=False)
    if not offsets:
        return Echo(text, first, ())
    if not isinstance(prompt, str):
        return Echo(text, first, tokenizer.offsets(ids))
    # What the tokenizer puts before a text (a bos) is not of the text.
    put = tokenizer.encode("", add_special_tokens=True)
    before = next((place for place, pair in enumerate(zip(ids, put, strict=False)) if pair[0] != pair[1]), len(put))
    return Echo(text, first, [0] * before + tokenizer.offsets(ids[before:]))
