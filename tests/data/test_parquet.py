"""Parquet files of every make, and of bad will: rows or one sentence, read within a bound in a process of its own."""

from __future__ import annotations

import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from pyarrow import parquet

import tenora.data.parquet
from tenora.data.containers import read_records
from tenora.data.dataset import validate_file

MESSAGES = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]


def written(tmp_path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table(columns), path, **options)
    return path


@pytest.mark.parametrize(
    "kind",
    [
        pyarrow.string(),
        pyarrow.large_string(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
        pyarrow.dictionary(pyarrow.int8(), pyarrow.large_string()),
    ],
)
@pytest.mark.parametrize("dictionary", [True, False])
def test_text_is_read_whatever_its_type(tmp_path: Path, kind: Any, dictionary: bool) -> None:
    text = pyarrow.array(["naïve", "東京", "naïve"])
    column = text.dictionary_encode().cast(kind) if pyarrow.types.is_dictionary(kind) else text.cast(kind)
    path = written(tmp_path, {"text": column}, use_dictionary=dictionary)
    assert [record.value for record in read_records(path)] == [{"text": "naïve"}, {"text": "東京"}, {"text": "naïve"}]


def test_structs_of_dictionaries_in_large_lists_are_read(tmp_path: Path) -> None:
    word = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    kind = pyarrow.large_list(pyarrow.struct([("role", word), ("content", pyarrow.large_string())]))
    try:
        column = pyarrow.array([MESSAGES, MESSAGES], kind)
    except pyarrow.ArrowException:
        column = pyarrow.array([MESSAGES, MESSAGES])
    path = written(tmp_path, {"messages": column, "made": pyarrow.array([2**60, 1], pyarrow.timestamp("us"))})
    assert [record.value for record in read_records(path)] == [{"messages": MESSAGES}] * 2
    assert validate_file(path).ok


def test_columns_have_capitals_and_spaces_as_spreadsheets_write_them(tmp_path: Path) -> None:
    path = written(tmp_path, {" Prompt": ["a", "b"], "COMPLETION": ["c", "d"]})
    assert next(record.value for record in read_records(path)) == {"prompt": "a", "completion": "c"}


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pyarrow.array([2**60, 1], pyarrow.timestamp("us")), "type timestamp[us]; write them as strings"),
        (pyarrow.array([2**30, 1], pyarrow.date32()), "type date32"),
        (pyarrow.array([[("a", "b")], []], pyarrow.map_(pyarrow.string(), pyarrow.string())), "type map"),
        (pyarrow.array([{"when": 2**60}, None], pyarrow.struct([("when", pyarrow.timestamp("us"))])), "timestamp"),
    ],
)
def test_a_column_that_json_has_no_values_for_is_told(tmp_path: Path, column: Any, words: str) -> None:
    report = validate_file(written(tmp_path, {"text": column}))
    assert (report.rows, report.issue_count, report.issues[0].code) == (1, 1, "data_type")
    assert words in report.summary()


def test_damaged_column_names_pages_and_footers_are_told(tmp_path: Path) -> None:
    path = written(tmp_path, {"text": [f"{n}" for n in range(400)], "name": ["x"] * 400}, compression="none")
    whole = path.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for damaged in (
        whole.replace(b"text", b"te\xff\xfe"),
        whole.replace(b"name", b"n\xff\xfe\xfd"),
        whole[:4] + b"\xff" * 64 + whole[68:],
        whole[: footer + 4] + b"\xff" * 16 + whole[footer + 20 :],
        whole[:-8] + b"\xff\xff\xff\x7fPAR1",
        whole[: len(whole) // 2],
        whole[:4],
    ):
        path.write_bytes(damaged)
        report = validate_file(path)
        assert report.summary().isprintable()
        assert report.ok or report.issues[-1].code in ("data_type", "too_long", "bad_utf8")


ZEROS = np.zeros(12_000_000, np.int8)
WORDS = pyarrow.DictionaryArray.from_arrays(pyarrow.array(ZEROS[:1_000_000]), ["x" * 100])
ONE_ROW = {count: pyarrow.array([0, count], pyarrow.int32()) for count in (len(ZEROS), len(WORDS))}


@pytest.mark.parametrize(
    ("column", "allowed"),
    [
        # A row of many values fits the bound and is refused by its size, before its values become objects.
        (pyarrow.ListArray.from_arrays(ONE_ROW[len(ZEROS)], pyarrow.array(ZEROS)), 768),
        (pyarrow.ListArray.from_arrays(ONE_ROW[len(WORDS)], WORDS), 768),
        (pyarrow.ListArray.from_arrays(ONE_ROW[len(ZEROS)], pyarrow.array(ZEROS)), 16),
        (pyarrow.array(["x" * 100_000_000], pyarrow.large_string()), 32),
    ],
)
def test_a_file_that_unpacks_to_much_is_told_within_its_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, column: Any, allowed: int
) -> None:
    path = written(tmp_path, {"messages": column}, compression="zstd", use_dictionary=column is not WORDS)
    assert path.stat().st_size < 20_000
    monkeypatch.setattr(tenora.data.parquet, "MEMORY_BYTES", allowed * 2**20)  # the kernel holds the reader to it
    tracemalloc.start()
    report = validate_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (report.rows, report.issues[0].code) == (1, "too_long")
    assert ("too much memory" in report.summary()) == (allowed < 768)
    assert peak < 2_000_000


def test_a_reader_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, {"text": ["a", "b"]})
    monkeypatch.setattr(tenora.data.parquet, "_READER", "tenora.no_such_module")
    assert "it broke its reader" in validate_file(path).summary()


def test_leaving_off_in_the_middle_ends_the_reader(tmp_path: Path) -> None:
    path = written(tmp_path, {"text": ["x" * 1000] * 20_000}, use_dictionary=False)
    records = read_records(path)
    assert next(records).value == {"text": "x" * 1000}
    records.close()  # type: ignore[attr-defined]  # waits for the process
