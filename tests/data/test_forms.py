"""Rows of every form as tokens: what each becomes, compared with the conversation that it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tenora.data.dataset import TokenizedDataset, UnusableRowsError, tokenize_file
from tenora.data.division import divide
from tenora.data.rows import ANSWERS, PREFERENCES, RowKind
from tenora.errors import DatasetError
from tenora.model.tokenizer import Tokenizer

from .rows import chat, learned_text, write_lines

USER = {"role": "user", "content": "Why?"}
GOOD_ANSWER, BAD_ANSWER = {"role": "assistant", "content": "So."}, {"role": "assistant", "content": "Because it is."}


def tokenize(tmp_path: Path, tokenizer: Tokenizer, *rows: Any, **options: Any) -> TokenizedDataset:
    return tokenize_file(write_lines(tmp_path / "rows.jsonl", list(rows)), tokenizer, **{"max_length": 512, **options})


def rows_of(dataset: TokenizedDataset) -> list[tuple[list[int], list[int]]]:
    rows = [dataset.row(index) for index in range(len(dataset))]
    return [(tokens.tolist(), weights.tolist()) for tokens, weights in rows]


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        (
            {"instruction": "Translate.", "input": "chat noir", "output": "black cat"},
            [("user", "Translate.\n\nchat noir"), ("assistant", "black cat")],
        ),
        ({"instruction": "Sing.", "input": "", "output": "La."}, [("user", "Sing."), ("assistant", "La.")]),
        (
            {"instruction": "Sing.", "output": "La.", "system": "Be brief."},
            [("system", "Be brief."), ("user", "Sing."), ("assistant", "La.")],
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be brief."},
                    {"from": "human", "value": "a?"},
                    {"from": "gpt", "value": "b"},
                    {"from": "tool", "value": "c"},
                    {"from": "gpt", "value": "d"},
                ]
            },
            [("system", "Be brief."), ("user", "a?"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")],
        ),
        (
            {"system": "Hm.", "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}]},
            [("system", "Hm."), ("user", "a?"), ("assistant", "b")],
        ),
    ],
)
def test_alpaca_and_sharegpt_are_the_conversations_that_they_mean(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], messages: list[tuple[str, str]]
) -> None:
    same = {"messages": [{"role": role, "content": content} for role, content in messages]}
    assert rows_of(tokenize(tmp_path, tokenizer, row)) == rows_of(tokenize(tmp_path, tokenizer, same))


def test_a_sharegpt_answer_of_weight_0_is_not_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    turns = [
        {"from": "human", "value": "a?"},
        {"from": "gpt", "value": "b", "weight": 0},
        {"from": "human", "value": "c?"},
        {"from": "gpt", "value": "d"},
    ]
    assert learned_text(tokenize(tmp_path, tokenizer, {"conversations": turns}), tokenizer) == ["d<|im_end|>"]


def test_text_is_learned_from_its_second_token_to_the_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = "One <|im_end|> two, naïve 東京."
    tokens, weights = rows_of(tokenize(tmp_path, tokenizer, {"text": text}))[0]
    assert tokens == [*tokenizer.encode(text), 2]
    assert weights == [0] + [1] * (len(tokens) - 1)


def pairs() -> list[dict[str, Any]]:
    """One preference in both of its forms."""
    return [
        {"input": {"messages": [USER]}, "preferred_output": [GOOD_ANSWER], "non_preferred_output": [BAD_ANSWER]},
        {"prompt": [USER], "chosen": [GOOD_ANSWER], "rejected": [BAD_ANSWER]},
    ]


@pytest.mark.parametrize("row", pairs())
def test_a_preference_becomes_its_chosen_and_its_rejected_answer(
    tmp_path: Path, tiny_base: Path, tokenizer: Tokenizer, row: dict[str, Any]
) -> None:
    dataset = tokenize(tmp_path, tokenizer, row, row)
    assert (len(dataset), dataset.examples, dataset.rows_per_example) == (4, 2, 2)
    assert dataset.lines.tolist() == [1, 1, 2, 2]
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_base)
    prompt = theirs.apply_chat_template([USER], add_generation_prompt=True, return_dict=True)["input_ids"]
    for index, answer in enumerate((GOOD_ANSWER, BAD_ANSWER)):
        tokens, weights = rows_of(dataset)[index]
        whole = theirs.apply_chat_template([USER, answer], return_dict=True)["input_ids"]
        assert tokens == whole
        assert tokens[: len(prompt)] == prompt
        assert weights[: len(prompt)] == [0] * len(prompt)
        assert learned_text(dataset, tokenizer, index) == [f"{answer['content']}<|im_end|>"]


def test_a_preference_is_encoded_as_its_two_supervised_rows(tmp_path: Path, tokenizer: Tokenizer) -> None:
    text = {"prompt": "Q: x\nA:", "chosen": " y z", "rejected": " no"}
    singles = [{"prompt": text["prompt"], "completion": text[key]} for key in ("chosen", "rejected")]
    assert rows_of(tokenize(tmp_path, tokenizer, text)) == rows_of(tokenize(tmp_path, tokenizer, *singles))
    # Answers of several messages: only the assistant's are learned.
    tail = [{"role": "tool", "content": "7"}, {"role": "assistant", "content": "It is 7."}]
    row = {"prompt": [USER], "chosen": [GOOD_ANSWER, *tail], "rejected": [BAD_ANSWER]}
    several = tokenize(tmp_path, tokenizer, row)
    assert rows_of(several)[0] == rows_of(tokenize(tmp_path, tokenizer, {"messages": [USER, GOOD_ANSWER, *tail]}))[0]
    assert learned_text(several, tokenizer) == ["So.<|im_end|>", "It is 7.<|im_end|>"]


def test_earlier_answers_of_the_prompt_are_not_learned(tmp_path: Path, tokenizer: Tokenizer) -> None:
    row = {"prompt": [USER, GOOD_ANSWER, USER], "chosen": [GOOD_ANSWER], "rejected": [BAD_ANSWER]}
    dataset = tokenize(tmp_path, tokenizer, row)
    assert [learned_text(dataset, tokenizer, index) for index in (0, 1)] == [
        ["So.<|im_end|>"],
        ["Because it is.<|im_end|>"],
    ]


def test_a_pair_is_never_torn_apart(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"p{n}", "chosen": f"c{n}", "rejected": f"r{n}"} for n in range(10)]
    dataset = tokenize(tmp_path, tokenizer, *rows)
    ((train, valid),) = divide([dataset], [0.3], seed=1)
    assert (train.examples, valid.examples) == (7, 3)
    for part in (train, valid):
        assert part.rows_per_example == 2
        for pair in range(part.examples):
            first, second = part.lines[2 * pair : 2 * pair + 2]
            assert first == second
            texts = [tokenizer.decode(part.row(2 * pair + side)[0].tolist()) for side in (0, 1)]
            assert texts == [f"p{first - 1}c{first - 1}", f"p{first - 1}r{first - 1}"]
    train.save(tmp_path / "rows.npz")
    loaded = TokenizedDataset.load(tmp_path / "rows.npz")
    assert loaded.rows_per_example == 2
    assert rows_of(loaded) == rows_of(train)
    picked = dataset.select(np.array([4, 2]))
    assert picked.lines.tolist() == [5, 5, 3, 3]


def test_truncation_of_a_preference_is_counted_once_and_leaves_both_answers(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    row = {"prompt": "p" * 10, "chosen": "c" * 40, "rejected": "r" * 60}
    with pytest.raises(UnusableRowsError, match="line 1: too_long: The row has 71 tokens and may have 30"):
        tokenize(tmp_path, tokenizer, row, max_length=30)
    cut = tokenize(tmp_path, tokenizer, row, max_length=30, truncate=True)
    assert (cut.truncated, [len(tokens) for tokens, _ in rows_of(cut)]) == (1, [30, 30])
    with pytest.raises(UnusableRowsError, match="no_trainable_tokens"):
        tokenize(tmp_path, tokenizer, {**row, "prompt": "p" * 30}, max_length=30, truncate=True)


@pytest.mark.parametrize(
    ("row", "wanted", "words"),
    [(chat(), PREFERENCES, "holds rows with one answer each"), (pairs()[0], ANSWERS, "holds preference rows")],
)
def test_a_file_of_the_other_kind_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], wanted: RowKind, words: str
) -> None:
    with pytest.raises(DatasetError, match=words) as caught:
        tokenize(tmp_path, tokenizer, row, row, kind=wanted)
    assert (caught.value.code, caught.value.param) == ("invalid_training_file", "training_file")
