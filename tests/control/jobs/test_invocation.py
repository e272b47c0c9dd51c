"""From the text of an invocation to its tokens, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from tenora.control.jobs.invocation import with_invocation
from tenora.data.dataset import TokenizedDataset
from tenora.errors import InvalidRequestError
from tenora.model.tokenizer import Tokenizer
from tenora.training.spec import LoraSpec


def rows(tokens: Sequence[int]) -> TokenizedDataset:
    """One row."""
    return TokenizedDataset(
        tokens=np.array(tokens, np.int32),
        weights=np.ones(len(tokens), np.uint8),
        offsets=np.array([0, len(tokens)], np.int64),
        lines=np.array([1], np.int64),
    )


def invoked(text: str) -> LoraSpec:
    return LoraSpec(type="alora", own={"invocation": text})


def test_an_empty_text_is_what_the_template_puts_before_an_answer(tokenizer: Tokenizer) -> None:
    chat = rows(
        tokenizer.encode_chat([{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}])
    )
    lora = with_invocation(invoked(""), tokenizer, [chat])
    assert lora.invocation == tuple(tokenizer.encode("<|im_start|>assistant"))
    assert with_invocation(LoraSpec(), tokenizer, [chat]) == LoraSpec()


def test_a_text_that_is_named_counts(tokenizer: Tokenizer) -> None:
    text = rows(tokenizer.encode("The fox. <|im_start|>check<|im_end|> Yes."))
    lora = with_invocation(invoked("<|im_start|>check<|im_end|>"), tokenizer, [rows([5]), text])
    assert lora.invocation == tuple(tokenizer.encode("<|im_start|>check<|im_end|>"))


@pytest.mark.parametrize(
    ("text", "message"), [("<|im_end|>check", "No training row holds"), ("0123 " * 200, "it must have 1 to 256")]
)
def test_one_that_could_never_act_is_refused(tokenizer: Tokenizer, text: str, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        with_invocation(invoked(text), tokenizer, [rows(tokenizer.encode("The quick brown fox."))])
    assert caught.value.param == "adapter.invocation"
