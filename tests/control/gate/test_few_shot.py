"""The k-shot prompt is what the template itself writes for the whole conversation, and plain text otherwise."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tenora.control.gate.few_shot import Prompted, few_shot_prompts
from tenora.data.dataset import TokenizedDataset
from tenora.data.encoding import encode_spans, end_of_text
from tenora.model.tokenizer import Tokenizer
from tests.support.tiny import CHAT_TEMPLATE

SYSTEM = "Be kind."
WITH_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    + SYSTEM
    + "<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE
)
TURNS = [(f"Question {i}?", f"Answer {i}.") for i in range(6)]


def with_template(tokenizer: Tokenizer, template: str) -> Tokenizer:
    return Tokenizer(
        tokenizer._backend,
        special_tokens=tokenizer.special_tokens,
        eos_token_ids=tokenizer.eos_token_ids,
        templates={"default": template},
    )


def conversation(turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    return [
        message
        for question, answer in turns
        for message in ({"role": "user", "content": question}, {"role": "assistant", "content": answer})
    ]


def chat_row(tokenizer: Tokenizer, turn: tuple[str, str]) -> tuple[list[int], list[int]]:
    text = tokenizer.render_chat(conversation([turn]), add_generation_prompt=False)
    asked = tokenizer.render_chat(conversation([turn])[:1], add_generation_prompt=True)
    return encode_spans(text, [(len(asked), len(text))], tokenizer, add_special_tokens=False)


def text_row(tokenizer: Tokenizer, turn: tuple[str, str]) -> tuple[list[int], list[int]]:
    prompt, completion = (tokenizer.encode(text) for text in turn)
    return [*prompt, *completion, end_of_text(tokenizer)], [0] * len(prompt) + [1] * (len(completion) + 1)


def dataset(rows: Sequence[tuple[list[int], list[int]]]) -> TokenizedDataset:
    return TokenizedDataset(
        tokens=np.concatenate([np.array(tokens, dtype=np.int32) for tokens, _ in rows]),
        weights=np.concatenate([np.array(weights, dtype=np.uint8) for _, weights in rows]),
        offsets=np.cumsum([0, *(len(tokens) for tokens, _ in rows)]),
        lines=np.arange(len(rows)),
    )


def shots_of(tokenizer: Tokenizer, found: Prompted, held_out: str) -> list[int]:
    """Which turns stand in a prompt, in order, the last being the row itself."""
    text = tokenizer.decode(found.tokens, skip_special_tokens=False)
    return sorted((i for i in range(len(TURNS)) if TURNS[i][0] in text), key=lambda i: text.index(TURNS[i][0]))


@pytest.mark.parametrize("template", [CHAT_TEMPLATE, WITH_SYSTEM], ids=["plain", "own system message"])
def test_a_conversation_is_what_the_template_writes(tokenizer: Tokenizer, template: str) -> None:
    own = with_template(tokenizer, template)
    train = dataset([chat_row(own, turn) for turn in TURNS[:4]])
    held_out = dataset([chat_row(own, turn) for turn in TURNS[4:]])
    found = list(few_shot_prompts(own, train, held_out, same=False, shots=3, max_length=512, seed=1))
    assert [prompt.row for prompt in found] == [0, 1]
    for prompt, turn in zip(found, TURNS[4:], strict=True):
        order = shots_of(own, prompt, turn[0])
        assert len(order) == 4
        whole = own.render_chat(conversation([TURNS[i] for i in order]), add_generation_prompt=False)
        assert own.decode(prompt.tokens, skip_special_tokens=False) == whole
        assert own.decode([prompt.tokens[place] for place in prompt.learned]) == turn[1]
        assert whole.count(SYSTEM) == (template == WITH_SYSTEM)


def test_completions_are_joined_by_an_empty_line(tokenizer: Tokenizer) -> None:
    train = dataset([text_row(tokenizer, turn) for turn in TURNS[:1]])
    held_out = dataset([text_row(tokenizer, turn) for turn in TURNS[1:2]])
    (found,) = few_shot_prompts(tokenizer, train, held_out, same=False, shots=1, max_length=512, seed=1)
    end = tokenizer.decode([end_of_text(tokenizer)], skip_special_tokens=False)
    assert tokenizer.decode(found.tokens, skip_special_tokens=False) == (
        "Question 0?Answer 0.\n\nQuestion 1?Answer 1." + end
    )
    assert tokenizer.decode([found.tokens[place] for place in found.learned], skip_special_tokens=False) == (
        "Answer 1." + end
    )


def test_a_row_is_never_its_own_example(tokenizer: Tokenizer) -> None:
    rows = dataset([chat_row(tokenizer, turn) for turn in TURNS])
    found = list(few_shot_prompts(tokenizer, rows, rows, same=True, shots=3, max_length=512, seed=0))
    assert [prompt.row for prompt in found] == list(range(6))
    for prompt in found:
        order = shots_of(tokenizer, prompt, TURNS[prompt.row][0])
        assert len(order) == 4
        assert order[-1] == prompt.row


def test_what_does_not_fit_is_left_out(tokenizer: Tokenizer) -> None:
    rows = dataset([chat_row(tokenizer, turn) for turn in TURNS])
    whole = list(few_shot_prompts(tokenizer, rows, rows, same=True, shots=2, max_length=512, seed=0))
    length = len(whole[0].tokens)
    assert not list(few_shot_prompts(tokenizer, rows, rows, same=True, shots=2, max_length=length - 5, seed=0))
    assert not list(few_shot_prompts(tokenizer, rows, rows, same=True, shots=6, max_length=10_000, seed=0))


@pytest.mark.real
def test_the_real_template_writes_its_system_message_once(real_base: Path) -> None:
    own = Tokenizer.load(real_base)
    rows = dataset([chat_row(own, turn) for turn in TURNS])
    found = next(few_shot_prompts(own, rows, rows, same=True, shots=3, max_length=2048, seed=0))
    order = shots_of(own, found, TURNS[0][0])
    whole = own.render_chat(conversation([TURNS[i] for i in order]), add_generation_prompt=False)
    assert own.decode(found.tokens, skip_special_tokens=False) == whole
