"""Rows that a head learns from: labels of every kind in every container, and pairs of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

from tenora.data.dataset import TokenizedDataset, tokenize_file, validate_file
from tenora.data.division import divide
from tenora.data.labels import Labels, table_of
from tenora.data.preview import preview_file
from tenora.data.rows import LABELLED, PAIRS, Label
from tenora.errors import DatasetError
from tenora.model.tokenizer import Tokenizer

from .rows import chat, write_lines

LABELS: list[tuple[str, list[Any], list[str], Any]] = [
    ("strings", ["b", "a", "b"], ["a", "b"], [1, 0, 1]),
    ("whole numbers", [10, 2, 2], ["2", "10"], [1, 0, 0]),
    ("booleans", [True, False, True], ["false", "true"], [1, 0, 1]),
    ("numbers", [0.5, 2.0, -1.0], [], [0.5, 2.0, -1.0]),
    ("lists", [["b"], ["a", "b"], ["c"]], ["a", "b", "c"], [[0, 1, 0], [1, 1, 0], [0, 0, 1]]),
]


def write(container: str, path: Path, rows: list[dict[str, Any]]) -> Path:
    """The rows in a container; a CSV cell writes lists and booleans as JSON does."""
    if container == "jsonl":
        return write_lines(path, rows)
    if container == "list":
        path.write_text(json.dumps(rows), encoding="utf-8")
    elif container == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        cells = [[str(row["text"]), row["label"]] for row in rows]
        said = [(text, label if isinstance(label, str) else json.dumps(label)) for text, label in cells]
        lines = "".join('{},"{}"\n'.format(text, label.replace('"', '""')) for text, label in said)
        path.write_text("text,label\n" + lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("container", ["jsonl", "list", "csv", "parquet"])
@pytest.mark.parametrize(("labels", "names", "values"), [case[1:] for case in LABELS], ids=[case[0] for case in LABELS])
def test_labels_are_the_same_numbers_in_every_container(
    tmp_path: Path, tokenizer: Tokenizer, container: str, labels: list[Any], names: list[str], values: list[Any]
) -> None:
    rows = [{"text": f"row {index}", "label": label} for index, label in enumerate(labels)]
    dataset = tokenize_file(write(container, tmp_path / "rows", rows), tokenizer, max_length=64, kind=LABELLED)
    found = dataset.labels
    assert found is not None
    if not names:
        found = found.numbers(dataset.lines)  # a CSV cell does not say that it is one
    assert (list(found.names), found.values.tolist()) == (names, values)
    dataset.save(tmp_path / "rows.npz")
    stored = TokenizedDataset.load(tmp_path / "rows.npz")
    assert stored.labels is not None
    assert dataset.labels is not None
    assert (stored.kind, stored.labels.names) == (LABELLED, dataset.labels.names)
    np.testing.assert_array_equal(stored.labels.values, dataset.labels.values)
    np.testing.assert_array_equal(stored.select(np.array([2, 0])).labels.values, dataset.labels.values[[2, 0]])  # type: ignore[union-attr]


@pytest.mark.parametrize("row", [{"text": "A text."}, {"prompt": "A text."}, chat("Why?", "So.")])
def test_a_head_reads_at_the_last_token_of_what_serving_would_read(
    tmp_path: Path, tokenizer: Tokenizer, row: dict[str, Any]
) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [{**row, "label": "x"}] * 2)
    dataset = tokenize_file(path, tokenizer, max_length=64)
    whole = tokenizer.encode("A text.")
    if "messages" in row:
        whole = tokenizer.encode(tokenizer.render_chat(row["messages"], add_generation_prompt=False), False)
    tokens, weights = dataset.row(0)
    assert tokens[:-1].tolist() == whole
    assert weights.tolist() == [0] * len(whole) + [1]  # what is predicted at the last token is its neighbour
    cut = tokenize_file(path, tokenizer, max_length=4, truncate=True)
    assert (cut.row(0)[0][:-1].tolist(), cut.truncated) == (whole[:4], 2)


def test_a_pair_becomes_its_texts_and_an_example_stays_whole(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"anchor": f"a{i}", "positive": f"p{i}", "negatives": [f"n{i}", f"m{i}"]} for i in range(4)]
    dataset = tokenize_file(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, max_length=64, kind=PAIRS)
    assert (len(dataset), dataset.examples, dataset.rows_per_example) == (16, 4, 4)
    picked = dataset.select(np.array([2]))
    assert [tokenizer.decode(picked.row(i)[0][:-1].tolist()) for i in range(4)] == ["a2", "p2", "n2", "m2"]
    parts = [row.part for row in preview_file(tmp_path / "rows.jsonl", tokenizer, max_length=64, limit=1).rows]
    assert parts == ["anchor", "positive", "negative", "negative"]
    write_lines(tmp_path / "one.jsonl", [{"anchor": "a", "positive": "p", "negative": "n"}] * 2)
    assert tokenize_file(tmp_path / "one.jsonl", tokenizer, max_length=64).rows_per_example == 3


GOOD, PAIR = {"text": "a", "label": "x"}, {"anchor": "a", "positive": "b"}


@pytest.mark.parametrize(
    ("rows", "line", "code", "words"),
    [
        ([GOOD, {"text": "a", "label": 3}], 2, "ambiguous_format", "a number as its label, and those before it a str"),
        ([GOOD, {"text": "a", "label": True}], 2, "ambiguous_format", "true or false as its label"),
        ([GOOD, {"text": "a", "label": ["x"]}], 2, "ambiguous_format", "a list of classes"),
        ([GOOD, {"text": "a"}], 2, "ambiguous_format", "has the form text, and those before it labelled text"),
        ([{"text": "a", "label": []}], 1, "missing_content", '["none"]'),
        ([{"text": "a", "label": [1, "a"]}], 1, "data_type", "of one kind"),
        ([{"text": "a", "label": [0.5]}], 1, "data_type", "of one kind"),
        ([{"text": "a", "label": " "}], 1, "missing_content", "name the class"),
        ([{"text": "a", "label": "nan"}], 1, "data_type", "neither a number nor a class"),
        ([{"text": "a", "label": 2**60}], 1, "data_type", "2^53"),
        ([{"text": "a", "label": "x" * 300}], 1, "too_long", "at most 256"),
        ([{"anchor": "a", "positive": "a"}], 1, "no_trainable_tokens", "equal"),
        ([{"anchor": "a", "positive": "b", "negatives": "c"}], 1, "data_type", "list of strings"),
        ([{"anchor": "a", "positive": "b", "negatives": ["c"] * 17}], 1, "too_long", "17 negatives"),
        ([{"anchor": "a", "positive": "b", "negative": "c", "negatives": ["c"]}], 1, "ambiguous_format", "all of them"),
        ([PAIR, {**PAIR, "negative": "c"}], 2, "ambiguous_format", "has 1 negative, and those before it no neg"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_label_is_told_with_its_line(
    tmp_path: Path, rows: list[dict[str, Any]], line: int, code: str, words: str
) -> None:
    (issue,) = validate_file(write_lines(tmp_path / "rows.jsonl", rows), min_rows=1).issues
    assert (issue.line, issue.code) == (line, code)
    assert words in issue.message


def test_a_number_that_is_none_is_told_where_it_lies(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a", "label": 1.5}\n{"text": "b", "label": NaN}\n', encoding="utf-8")
    (issue,) = validate_file(tmp_path / "rows.jsonl").issues
    assert (issue.line, issue.code) == (2, "bad_json")


def labels(*found: Label) -> Labels:
    return Labels.of(found)


LINES = np.array([3, 5, 8])


def test_a_label_that_is_in_no_training_row_is_named_with_its_lines() -> None:
    with pytest.raises(
        DatasetError, match=r"The label 'c' of lines 5, 8 is in no training row, where there are 'a', 'b'"
    ):
        labels("a", "c", "c").under(("a", "b"), LINES)
    with pytest.raises(DatasetError, match="'c' of line 5"):
        labels(("a",), ("a", "c"), ("a",)).under(("a", "b"), LINES)


def test_files_of_one_job_share_a_table() -> None:
    one, two = labels("b", "b", "c"), labels("a", "c", "c")
    names = table_of([one, two])
    assert names == ("a", "b", "c")
    assert [part.under(names, LINES).values.tolist() for part in (one, two)] == [[1, 1, 2], [0, 2, 2]]
    several = labels(("b",), ("b", "c"), ("c",)).under(names, LINES)
    assert several.values.tolist() == [[False, True, False], [False, True, True], [False, False, True]]


def test_whole_numbers_are_classes_until_numbers_are_wanted() -> None:
    found = labels(3, 1, 3)
    assert (found.kind, found.counts()) == ("class", {"1": 1, "3": 2})
    assert found.numbers(LINES).values.tolist() == [3.0, 1.0, 3.0]
    with pytest.raises(DatasetError, match="labels of line 5 are no numbers"):
        labels("1", "a", "2").numbers(LINES)


def test_every_class_is_held_out_by_its_share_and_none_wholly(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [{"text": f"{index} " * 4, "label": "x" if index % 10 else "y"} for index in range(100)]
    rows += [{"text": "the only one of its kind", "label": "z"}]
    dataset = tokenize_file(write_lines(tmp_path / "rows.jsonl", rows), tokenizer, max_length=64)
    ((train, held_out),) = divide([dataset], [0.2], seed=3)
    assert train.labels is not None
    assert held_out.labels is not None
    assert train.labels.counts() == {"x": 72, "y": 8, "z": 1}
    assert held_out.labels.counts() == {"x": 18, "y": 2, "z": 0}
    ((train, _),) = divide([dataset], [0.6], seed=3)
    assert train.labels is not None
    assert train.labels.counts()["z"] == 1
