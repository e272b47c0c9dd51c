"""A fixed English text of several kinds of prose, which no training file is about: forgetting shows there."""

from __future__ import annotations

from importlib import resources
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tenora.model.tokenizer import Tokenizer

_MOST_TOKENS = 288  # each evaluation that finds a better adapter measures them


def general_text(tokenizer: Tokenizer, max_length: int) -> tuple[int, ...]:
    """The text's tokens, at most `max_length`."""
    text = resources.files(__package__).joinpath("forgetting_text.txt").read_text("utf-8")
    return tuple(tokenizer.encode(text, add_special_tokens=True)[: min(_MOST_TOKENS, max_length)])
