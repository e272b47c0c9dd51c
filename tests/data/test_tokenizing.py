"""Rows as tokens: exact spans, compared with hand-worked ones and with transformers' own mask."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import models, pre_tokenizers

from tenora.control.adapters.records import Target
from tenora.control.inference.records import GenerationRequest
from tenora.control.inference.stops import Stops
from tenora.data.dataset import TokenizedDataset, UnusableRowsError, tokenize_file
from tenora.data.encoding import encode_spans
from tenora.engine.messages import SamplingParams
from tenora.errors import DatasetError
from tenora.model.tokenizer import Tokenizer

from .rows import chat, learned_text, random_rows, write_lines

TURNS = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "One."},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "Two 東京.", "weight": 0},
        {"role": "user", "content": [{"type": "text", "text": "c"}, {"type": "text", "text": "?"}]},
        {"role": "assistant", "content": "Three\nlines."},
    ]
}


def test_chat_learns_the_answers_and_their_end_token_and_nothing_else(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [TURNS])
    dataset = tokenize_file(path, tokenizer, max_length=512)
    assert learned_text(dataset, tokenizer) == ["One.<|im_end|>", "Three\nlines.<|im_end|>"]
    assert tokenizer.decode(dataset.row(0)[0].tolist(), skip_special_tokens=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>"
        "\n<|im_start|>user\nb?<|im_end|>\n<|im_start|>assistant\nTwo 東京.<|im_end|>\n<|im_start|>user\nc?<|im_end|>\n"
        "<|im_start|>assistant\nThree\nlines.<|im_end|>\n"
    )


def test_chat_mask_equals_transformers_assistant_mask(tmp_path: Path, tiny_base: Path, tokenizer: Tokenizer) -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}"
        "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
        "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    )
    messages = [
        {"role": "user", "content": "Say <|im_end|> & naïve café 🙂"},
        {"role": "assistant", "content": "One two three."},
        {"role": "user", "content": "More"},
        {"role": "assistant", "content": "Ärzte  über\n\nalles"},
    ]
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_base).apply_chat_template(
        messages, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    ours = tokenize_file(write_lines(tmp_path / "rows.jsonl", [{"messages": messages}]), tokenizer, max_length=512)
    assert ours.tokens.tolist() == theirs["input_ids"]
    assert ours.weights.tolist() == theirs["assistant_masks"]


def test_prompt_and_completion_learns_the_completion_and_the_end(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(
        tmp_path / "rows.jsonl", [{"prompt": "Q: x\nA:", "completion": " y z"}, {"prompt": "", "completion": "ab"}]
    )
    dataset = tokenize_file(path, tokenizer, max_length=64)
    tokens, weights = dataset.row(0)
    prompt, completion = tokenizer.encode("Q: x\nA:"), tokenizer.encode(" y z")
    assert tokens.tolist() == [*prompt, *completion, 2]
    assert weights.tolist() == [0] * len(prompt) + [1] * (len(completion) + 1)
    assert dataset.row(1)[1][0] == 0  # nothing precedes the first token
    assert dataset.num_trained == int(weights.sum()) + int(dataset.row(1)[1].sum())


def _backend(pieces: list[str], merges: list[tuple[str, str]], pre: Any) -> Tokenizer:
    vocabulary = {piece: index for index, piece in enumerate(["<end>", *pieces])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, merges))
    backend.add_special_tokens(["<end>"])
    backend.decoder = tokenizers.decoders.Fuse()
    if pre is not None:
        backend.pre_tokenizer = pre
        backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    return Tokenizer(backend, special_tokens={"eos_token": "<end>"}, eos_token_ids=[0], templates={})


def test_a_merge_across_the_prompts_end_is_undone_as_serving_would_see_it() -> None:
    tokenizer = _backend(["a", "\n", "b", "\n\n"], [("\n", "\n")], None)
    tokens, weights = encode_spans("a\n\nb", [(2, 4)], tokenizer, add_special_tokens=False)
    assert tokens == [*tokenizer.encode("a\n"), *tokenizer.encode("\nb")]
    assert tokens != tokenizer.encode("a\n\nb")
    assert weights == [0, 0, 1, 1]


def test_a_tokenizer_that_prepends_a_space_is_cut_from_the_whole_text() -> None:
    tokenizer = _backend(["▁", "a", "b", "c"], [], pre_tokenizers.Metaspace(prepend_scheme="always"))
    tokens, weights = encode_spans("abc", [(1, 2)], tokenizer, add_special_tokens=False)
    assert tokens == tokenizer.encode("abc") == [1, 2, 3, 4]
    assert weights == [0, 0, 1, 0]


def test_long_rows_are_an_error_that_names_lines_unless_truncation_is_asked_for(
    tmp_path: Path, tokenizer: Tokenizer
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [chat("a", "b"), chat("a", "b" * 80), chat("a", "c" * 90)])
    with pytest.raises(UnusableRowsError, match=r"line 2: too_long: The row has \d+ tokens and may have 40") as caught:
        tokenize_file(path, tokenizer, max_length=40)
    assert [(issue.line, issue.code) for issue in caught.value.report.issues] == [(2, "too_long"), (3, "too_long")]
    whole, cut = (
        tokenize_file(path, tokenizer, max_length=400),
        tokenize_file(path, tokenizer, max_length=40, truncate=True),
    )
    assert (whole.truncated, cut.truncated) == (0, 2)
    assert (
        cut.row(1)[0].tolist() == whole.row(1)[0].tolist()[:40]
    )  # the right end goes: the row begins as a prompt does
    assert cut.row(0)[0].tolist() == whole.row(0)[0].tolist()


def test_truncation_that_leaves_nothing_to_learn_is_an_error(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [chat("a" * 90, "b")])
    with pytest.raises(DatasetError, match="line 1: no_trainable_tokens"):
        tokenize_file(path, tokenizer, max_length=40, truncate=True)


@pytest.mark.parametrize(
    ("row", "code", "words"),
    [
        ({**chat(), "tools": [{"type": "function"}]}, "data_type", "does not render `tools`"),
        (
            {"messages": [*chat()["messages"], {"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}]},
            "data_type",
            "does not render `tool_calls`",
        ),
        ({"messages": [{"role": "assistant", "content": "Hi."}]}, "ambiguous_format", "begins with an assistant"),
        ({"messages": "x"}, "missing_messages_list", "at least one message"),
    ],
)
def test_what_the_template_cannot_say_is_refused(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(UnusableRowsError, match=words) as caught:
        tokenize_file(write_lines(tmp_path / "rows.jsonl", [row]), tokenizer, max_length=512)
    assert [issue.code for issue in caught.value.report.issues] == [code]


def test_datasets_survive_disk(tmp_path: Path) -> None:
    dataset = random_rows(20, seed=1)
    dataset.save(tmp_path / "deep" / "rows.npz")
    loaded = TokenizedDataset.load(tmp_path / "deep" / "rows.npz")
    for name in ("tokens", "weights", "offsets", "lines"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(dataset, name), strict=True)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["rows.npz"]
    np.testing.assert_array_equal(loaded.select(np.array([4, 2])).row(1)[0], dataset.row(2)[0])


def test_a_template_that_rewrites_earlier_turns_is_refused(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m['content'] + ('!' if loop.last else '.') }}{% endfor %}"
    base = _backend(list("ab!."), [], None)
    moving = Tokenizer(base._backend, special_tokens={}, eos_token_ids=[0], templates={"default": template})
    row = {"messages": [*chat("a", "b")["messages"], *chat("a", "b")["messages"]]}
    with pytest.raises(UnusableRowsError, match="renders messages\\[1\\] differently"):
        tokenize_file(write_lines(tmp_path / "rows.jsonl", [row]), moving, max_length=512)


TEMPLATE = "{{% for m in messages %}}{{{{ '<|im_start|>' + m.role + '\n' + m.content }}}}{end}{{% endfor %}}{asking}"
BETWEEN = "{% if m.role == 'assistant' and not loop.last %}{{ '<|endoftext|>' }}{% endif %}"
ASKING = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"


def based(tiny_base: Path, directory: Path, end: str, ends: list[int]) -> Tokenizer:
    """The tiny base's tokenizer with <|endoftext|> (0) as its own end and another template."""
    shutil.copytree(tiny_base, directory)
    (directory / "chat_template.jinja").write_text(TEMPLATE.format(end=end, asking=ASKING))
    for name, values in (
        ("tokenizer_config", {"eos_token": "<|endoftext|>"}),
        ("config", {"eos_token_id": 0}),
        ("generation_config", {"eos_token_id": ends}),
    ):
        path = directory / f"{name}.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    return Tokenizer.load(directory)


@pytest.mark.parametrize(
    ("end", "ends", "learned"),
    [
        # Qwen2.5's bases: the template's end of turn is no end of any configuration.
        ("{{ '<|im_end|>\n' }}", [0], ["One.<|im_end|>", "Two.<|im_end|>"]),
        # GLM: what begins the next message ends the last one.
        ("", [0, 1], ["One.<|im_start|>", "Two.<|im_start|>"]),
        (BETWEEN, [0], ["One.<|endoftext|>", "Two.<|endoftext|>"]),
    ],
)
def test_every_learned_answer_ends_with_a_token_that_serving_stops_at(
    tiny_base: Path, tmp_path: Path, end: str, ends: list[int], learned: list[str]
) -> None:
    tokenizer = based(tiny_base, tmp_path / "base", end, ends)
    row = {"messages": [*chat("a?", "One.")["messages"], *chat("b?", "Two.")["messages"]]}
    dataset = tokenize_file(write_lines(tmp_path / "rows.jsonl", [row]), tokenizer, max_length=512)
    assert learned_text(dataset, tokenizer) == learned
    tokens, weights = dataset.row(0)
    lasts = [index for index in np.flatnonzero(weights) if index + 1 == len(weights) or not weights[index + 1]]
    request = GenerationRequest(
        target=Target("base", None, "t", "t"), prompt_token_ids=[1], sampling=SamplingParams(max_tokens=1)
    )
    assert {int(tokens[index]) for index in lasts} <= set(Stops.of(request, tokenizer).tokens)


@pytest.mark.parametrize("end", ["", "{{ '\n\n' }}", "{{ '<|no token|>\n' }}"])
def test_a_template_whose_end_of_turn_is_no_token_is_refused_with_the_reason(
    tiny_base: Path, tmp_path: Path, end: str
) -> None:
    tokenizer = based(tiny_base, tmp_path / "base", end, [0])
    path = write_lines(tmp_path / "rows.jsonl", [chat("a?", "One.")])
    with pytest.raises(UnusableRowsError, match=r"holds no end token.*rows of `prompt` and `completion`") as caught:
        tokenize_file(path, tokenizer, max_length=512)
    assert [issue.code for issue in caught.value.report.issues] == ["ambiguous_format"]
    completions = write_lines(tmp_path / "other.jsonl", [{"prompt": "a? ", "completion": "One."}])
    dataset = tokenize_file(completions, tokenizer, max_length=512)
    assert learned_text(dataset, tokenizer) == ["One.<|endoftext|>"]


def test_a_broken_dataset_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "rows.npz"
    with pytest.raises(DatasetError, match="cannot be read"):
        TokenizedDataset.load(path)
    random_rows(4, seed=0).save(path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match="cannot be read"):
        TokenizedDataset.load(path)
    good = random_rows(4, seed=0)
    TokenizedDataset(good.tokens[:-1], good.weights, good.offsets, good.lines).save(path)
    with pytest.raises(DatasetError, match="contradicts"):
        TokenizedDataset.load(path)
