"""The real base against transformers.

Tolerances, as shares of the largest logit (about 38): float32 1e-5; bfloat16 4e-2 (there transformers differs from its
own float32 by 3.3e-2, and its cached from its uncached forward by 2.7e-2). In both the most likely token is the same
wherever transformers' margin is beyond the tolerance.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tenora.model.loading import load_decoder
from tenora.model.tokenizer import Detokenizer, Tokenizer
from tests.model.paged import PagedRun
from tests.support.full import full

pytestmark = pytest.mark.real

CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is a fjord?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Naïve 東京 🙂\n\n  x = 1"},
        {"role": "assistant", "content": "ok"},
    ],
]


@pytest.fixture(scope="module")
def theirs(base: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(base)


def test_tokenizer_and_chat_equal_transformers(base: Path, theirs: Any) -> None:
    tokenizer = Tokenizer.load(base)
    assert tokenizer.vocab_size == len(theirs) == 49152
    assert tokenizer.eos_token_ids == {2}
    for messages in CHATS:
        for generation in (True, False):
            text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=generation)
            ids = theirs.apply_chat_template(messages, add_generation_prompt=generation, return_dict=False)
            assert tokenizer.render_chat(messages, add_generation_prompt=generation) == text
            assert tokenizer.encode_chat(messages, generation) == ids
            assert tokenizer.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            detokenizer = Detokenizer(tokenizer, skip_special_tokens=False)
            assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == text
            assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), full(torch.bfloat16, 4e-2)])
@torch.no_grad()
def test_logits_equal_transformers(dtype: torch.dtype, tolerance: float, base: Path, theirs: Any) -> None:
    prompts = [torch.tensor(theirs.apply_chat_template(chat, return_dict=False)[:24]) for chat in CHATS]
    reference = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    expected = [reference(prompt[None]).logits[0].float() for prompt in prompts]
    del reference
    decoder = load_decoder(base, dtype=dtype)
    first, second = (len(prompt) for prompt in prompts)
    schedule = [[(0, first), (1, 9)], [(1, second - 12)], *([(1, 1)] for _ in range(3))]
    for actual, wanted in zip(PagedRun(decoder, prompts, block_size=16).run(schedule), expected, strict=True):
        assert_close(actual, wanted, tolerance)


def assert_close(actual: Tensor, wanted: Tensor, tolerance: float) -> None:
    allowed = tolerance * wanted.abs().max()
    assert (actual - wanted).abs().max() <= allowed
    top = wanted.topk(2).values
    clear = top[:, 0] - top[:, 1] > 2 * allowed
    assert clear.any()
    assert torch.equal(actual.argmax(1)[clear], wanted.argmax(1)[clear])
