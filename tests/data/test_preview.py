"""Previews agree with what is then trained on, to the token."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from tenora.data.dataset import tokenize_file
from tenora.data.duplicates import near_duplicates
from tenora.data.preview import Span, preview_file, spans_of
from tenora.model.tokenizer import Tokenizer

from .rows import chat, write_lines

MIXED = [
    {"messages": [*chat("a", "b")["messages"], *chat("naïve 東京?", "yes 🙂")["messages"]]},
    chat("x" * 90, "y"),
    {"messages": "none"},
    chat("c", "d" * 90),
]


def test_counts_and_texts_are_those_of_the_dataset(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [MIXED[0], MIXED[1], MIXED[3]])
    dataset = tokenize_file(path, tokenizer, max_length=130, truncate=True)
    preview = preview_file(path, tokenizer, max_length=130, truncate=True)
    assert (preview.format, preview.has_more) == ("chat", False)
    for index, row in enumerate(preview.rows):
        tokens, weights = dataset.row(index)
        assert (row.line, row.tokens, row.trained_tokens) == (index + 1, len(tokens), weights.sum())
        assert "".join(span.text for span in row.spans) == tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
        edges = np.flatnonzero(np.diff(weights)) + 1
        assert [span.trained for span in row.spans] == [bool(part[0]) for part in np.split(weights, edges)]
        assert [tokenizer.encode(span.text) for span in row.spans] == [
            part.tolist() for part in np.split(tokens, edges)
        ]
    assert sum(row.truncated for row in preview.rows) == dataset.truncated


def test_rows_that_cannot_be_used_say_why_and_stop_nothing(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write_lines(tmp_path / "rows.jsonl", MIXED)
    rows = preview_file(path, tokenizer, max_length=60).rows
    assert [[issue.code for issue in row.issues] for row in rows] == [
        [],
        ["too_long"],
        ["missing_messages_list"],
        ["too_long"],
    ]
    assert [bool(row.spans) for row in rows] == [True, True, False, True]
    cut = preview_file(path, tokenizer, max_length=60, truncate=True).rows
    assert [[issue.code for issue in row.issues] for row in cut] == [
        [],
        ["no_trainable_tokens"],
        ["missing_messages_list"],
        [],
    ]
    assert [row.tokens for row in cut][1:] == [60, 0, 60]
    assert cut[3].truncated_tokens == rows[3].tokens - 60


def test_a_character_that_is_cut_in_two_goes_to_what_follows(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("a東b")
    assert len(tokens) == 4  # the character has two tokens
    spans = spans_of((tokens, [0, 0, 1, 1]), tokenizer)
    assert spans == [Span("a", trained=False), Span("東b", trained=True)]
    assert "".join(span.text for span in spans_of((tokens[:2], [0, 1]), tokenizer)) == "a\ufffd"


def test_spaces_of_a_tokenizer_that_drops_the_first_one_are_kept() -> None:
    vocabulary = {piece: index for index, piece in enumerate(["<end>", "▁a", "▁b"])}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<end>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    backend.decoder = tokenizers.decoders.Metaspace(prepend_scheme="always")
    plain = Tokenizer(backend, special_tokens={"eos_token": "<end>"}, eos_token_ids=[0], templates={})
    assert plain.decode([1, 2, 1]) == "a b a"
    assert spans_of(([1, 2, 1], [0, 1, 0]), plain) == [
        Span("a", trained=False),
        Span(" b", trained=True),
        Span(" a", trained=False),
    ]


@pytest.mark.real
@pytest.mark.parametrize("name", ["pubmedqa_sft", "devils_dictionary"])
def test_real_files_on_the_real_tokenizer(real_base: Path, shared_data: Path, name: str) -> None:
    tokenizer = Tokenizer.load(real_base)
    path = shared_data / f"{name}_train.jsonl"
    dataset = tokenize_file(path, tokenizer, max_length=2048)
    preview = preview_file(path, tokenizer, max_length=2048, limit=100)
    assert preview.format == "chat"
    for index, row in enumerate(preview.rows):
        tokens, weights = dataset.row(index)
        assert (row.tokens, row.trained_tokens) == (len(tokens), weights.sum())
        assert "".join(span.text for span in row.spans) == tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    held_out = tokenize_file(shared_data / f"{name}_valid.jsonl", tokenizer, max_length=2048)
    assert near_duplicates(dataset, held_out=held_out).count == 0


@pytest.mark.real
def test_a_real_labelled_file_is_previewed_with_its_labels(real_base: Path, shared_data: Path) -> None:
    path = shared_data / "pubmedqa_decision_train.jsonl"
    preview = preview_file(path, Tokenizer.load(real_base), max_length=2048, limit=3)
    texts = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()[:3]]
    assert (preview.format, [row.label for row in preview.rows]) == ("labelled_text", [text["label"] for text in texts])
    assert ["".join(span.text for span in row.spans) for row in preview.rows] == [text["text"] for text in texts]
