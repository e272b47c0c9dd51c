"""The invocation of an activated adapter: from the text in a request to the tokens that rows and prompts must hold."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from tenora.adapters.invocation import MAX_INVOCATION, NEVER, adapted_from
from tenora.data.dataset import TokenizedDataset
from tenora.errors import InvalidRequestError
from tenora.model.tokenizer import Tokenizer
from tenora.training.spec import LoraSpec

_PARAM = "adapter.invocation"


def with_invocation(lora: LoraSpec, tokenizer: Tokenizer, rows: Sequence[TokenizedDataset]) -> LoraSpec:
    """A shape that knows the tokens of its invocation, if its kind has one.

    Args:
        lora: as asked for. An empty text stands for what the chat template puts before an answer.
        tokenizer: of the base.
        rows: to train on.

    Raises:
        InvalidRequestError: the text has no tokens or too many, the base no such template, or no row holds it.
    """
    text = lora.own.get("invocation")
    if text is None:
        return lora
    tokens = tokenizer.encode(text or _before_an_answer(tokenizer))
    if not 1 <= len(tokens) <= MAX_INVOCATION:
        raise InvalidRequestError(
            f"adapter.invocation has {len(tokens)} tokens; it must have 1 to {MAX_INVOCATION}.", param=_PARAM
        )
    if not any(_holds(dataset, tokens) for dataset in rows):
        raise InvalidRequestError(
            "No training row holds the adapter's invocation, so it would never act; put the string into the rows, or "
            "name one that they hold in adapter.invocation.",
            param=_PARAM,
        )
    return msgspec.structs.replace(lora, invocation=tuple(tokens))


def _before_an_answer(tokenizer: Tokenizer) -> str:
    """What the chat template puts before an answer, without the space at its end, which may merge with the answer."""
    question = [{"role": "user", "content": "?"}]
    plain, asked = (tokenizer.render_chat(question, add_generation_prompt=wanted) for wanted in (False, True))
    found = asked.removeprefix(plain).strip() if asked.startswith(plain) else ""
    if not found:
        raise InvalidRequestError(
            "The base's chat template puts nothing before an answer; name a string in adapter.invocation.", param=_PARAM
        )
    return found


def _holds(rows: TokenizedDataset, tokens: Sequence[int]) -> bool:
    return any(adapted_from(rows.row(row)[0].tolist(), tokens) != NEVER for row in range(len(rows)))
