"""Which tokens end a text: one answer for serving, which stops at them, and for training, which teaches them.

They are said in four places, none of which knows of the others: the tokenizer's `eos_token`, `config.json`,
`generation_config.json`, and the chat template, by what it writes after an answer. All of them count. Free of torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tenora.errors import InvalidRequestError
from tenora.model.spec import read_json

# What transformers' configuration classes fill in where no place names an end.
_OF_FAMILY: dict[str, int] = {"llama": 2, "mistral": 2}
_CONTENT = ("Question Q7f3", "Answer A7f3", "Reply R7f3")  # words that no template writes


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """How the chat template ends an assistant's message.

    Attributes:
        text: what it writes after the content of a conversation's last message.
        closing: the beginning of that, up to and with the token that ends the turn; "" if it is written only between
            two messages, or if there is none.
        token_id: the added token that ends the turn; None if that is plain text or nothing.
    """

    text: str
    closing: str
    token_id: int | None


def declared_ends(directory: Path, eos_token: int | None) -> frozenset[int]:
    """The end tokens of a Hugging Face directory's configurations, together with the tokenizer's own.

    Args:
        directory: with `config.json` and `generation_config.json`, if it has them.
        eos_token: the id of the tokenizer's `eos_token`.
    """
    config = read_json(directory / "config.json")
    ends = frozenset() if eos_token is None else frozenset({eos_token})
    for declared in (config, read_json(directory / "generation_config.json")):
        value = declared.get("eos_token_id")
        ends |= frozenset(each for each in (value if isinstance(value, list) else [value]) if type(each) is int)
    default = _OF_FAMILY.get(str(config.get("model_type")))
    return ends if ends or default is None else frozenset({default})


def find_turn_end(
    render: Callable[[Sequence[Mapping[str, Any]]], str], added: Mapping[str, int], ends: frozenset[int]
) -> TurnEnd | None:
    """What follows an assistant's content in the text of a conversation; None if the template cannot say it.

    Args:
        render: a conversation as text, without a generation prompt.
        added: ids of the tokenizer's added tokens.
        ends: the end tokens that are known already. Where the template writes nothing after a last message, the token
            that begins the next one ends the turn if it is one of them (GLM's `<|user|>`).
    """
    question, answer, reply = _CONTENT
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    text = _after(render, turns, answer)
    if text is None:
        return None
    closing = _leading(text, added)
    if closing:
        return TurnEnd(text, closing, added[closing.lstrip()])
    between = _after(render, [*turns, {"role": "user", "content": reply}], answer)
    token_id = added.get(_leading(between or "", added).lstrip())
    return TurnEnd(text, "", token_id if token_id in ends else None)


def _after(
    render: Callable[[Sequence[Mapping[str, Any]]], str], messages: Sequence[Mapping[str, Any]], content: str
) -> str | None:
    try:
        _before, found, after = render(messages).rpartition(content)
    except InvalidRequestError:
        return None
    return after if found else None


def _leading(text: str, added: Mapping[str, int]) -> str:
    """The added token, the longest one, that a text begins with, and the white space before it; "" without one."""
    bare = text.lstrip()
    token = max((token for token in added if bare.startswith(token)), key=len, default="")
    return text[: len(text) - len(bare) + len(token)] if token else ""
