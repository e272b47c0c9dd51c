"""The same rows in JSON Lines, CSV and Parquet: detected by content, equal tokens, faults with their record."""

from __future__ import annotations

import csv
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from tenora.data import containers, parquet_reader, records, tables
from tenora.data.dataset import TokenizedDataset, tokenize_file, validate_file
from tenora.model.tokenizer import Tokenizer

from .rows import write_lines

ROWS: dict[str, list[dict[str, Any]]] = {
    "chat": [
        {
            "messages": [
                {"role": "user", "content": f"Question {n}, naïve?\nYes?"},
                {"role": "assistant", "content": f'"{n}", 東京', "weight": 1},
            ]
        }
        for n in range(5)
    ],
    "prompt_completion": [{"prompt": f"{n}, ", "completion": "a\n\nb"} for n in range(5)],
    "text": [{"text": f"{n} of\nmany"} for n in range(5)],
    "alpaca": [{"instruction": "Do.", "input": "x" * (n % 2), "output": f"{n}"} for n in range(5)],
    "sharegpt": [
        {"conversations": [{"from": "human", "value": f"{n}?"}, {"from": "gpt", "value": "No."}]} for n in range(5)
    ],
    "preference": [
        {
            "input": {"messages": [{"role": "user", "content": f"{n}?"}]},
            "preferred_output": [{"role": "assistant", "content": "So."}],
            "non_preferred_output": [{"role": "assistant", "content": "Hm."}],
        }
        for n in range(5)
    ],
    "trl_preference": [{"prompt": f"{n}: ", "chosen": "a", "rejected": "b"} for n in range(5)],
}


def as_json(directory: Path, rows: list[dict[str, Any]]) -> Path:
    return write_lines(directory / "rows.json", rows)


def as_csv(directory: Path, rows: list[dict[str, Any]]) -> Path:
    path = directory / "rows.csv"
    with path.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", *rows[0]])
        for row in rows:
            cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
            writer.writerow(["7", *cells])
    return path


def as_parquet(directory: Path, rows: list[dict[str, Any]]) -> Path:
    path = directory / "rows.parquet"
    table = pyarrow.Table.from_pylist([{"id": 7, **row} for row in rows])
    parquet.write_table(table, path, row_group_size=2)
    return path


CONTAINERS = [as_json, as_csv, as_parquet]


def same(left: TokenizedDataset, right: TokenizedDataset) -> bool:
    return all(
        getattr(left, name).tolist() == getattr(right, name).tolist()
        for name in ("tokens", "weights", "offsets", "lines")
    )


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize("write", CONTAINERS)
def test_rows_are_the_same_in_every_container(tmp_path: Path, tokenizer: Tokenizer, write: Any, form: str) -> None:
    path = write(tmp_path, ROWS[form])
    path = path.rename(tmp_path / "anonymous")  # only the content tells
    report = validate_file(path)
    assert (report.summary(), report.format, report.rows) == ("5 rows, all usable.", form, 5)
    expected = tokenize_file(write_lines(tmp_path / "expected.jsonl", ROWS[form]), tokenizer, max_length=512)
    found = tokenize_file(path, tokenizer, max_length=512)
    assert same(found, expected)
    assert found.kind == expected.kind


@pytest.mark.parametrize("write", [as_csv, as_parquet])
def test_a_faulty_record_is_named_by_its_number(tmp_path: Path, write: Any) -> None:
    rows = [*ROWS["alpaca"][:3], {"instruction": "", "input": "", "output": "x"}, ROWS["alpaca"][4]]
    report = validate_file(write(tmp_path, rows))
    assert [(issue.line, issue.code) for issue in report.issues] == [(4, "missing_content")]
    assert report.rows == 5


def test_nulls_that_parquet_puts_into_structs_count_as_absent(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        {"messages": [{"role": "user", "content": "c", "name": "Ann"}, {"role": "assistant", "content": "d"}]},
    ]
    rows[0]["messages"] += ROWS["chat"][0]["messages"]
    found = tokenize_file(as_parquet(tmp_path, rows), tokenizer, max_length=512)
    assert same(found, tokenize_file(as_json(tmp_path, rows), tokenizer, max_length=512))


@pytest.mark.parametrize(
    ("content", "line", "code", "words"),
    [
        (b"question,answer\na,b\n", 1, "missing_messages_list", "header of columns"),
        (b"just some words\nand more\n", 1, "missing_messages_list", "header of columns"),
        (b"prompt;completion\na;b\na\n", 2, "data_type", "quote cells that hold semicolons"),
        (b"prompt\na\nb\n", 1, "missing_content", "`completion`"),
        (b"prompt,completion,label\na,b,true\n", 1, "ambiguous_format", "`label`"),
        (b"prompt,completion,text\na,b,c\n", 1, "ambiguous_format", "text (`text`)"),
        (b"text,text\na,b\n", 1, "ambiguous_format", "twice"),
        (b"prompt,completion\na,b\na,b,c\na,b\n", 2, "data_type", "3 cells and the header 2"),
        (b'prompt,completion\na,b\n\na,"b"c"\na,b\n', 2, "data_type", "not CSV"),
        (b"prompt,completion\na,b\na,\xff\na,b\n", 2, "bad_utf8", "UTF-8"),
        (b"messages\n[1\n[]\n", 1, "bad_json", "`messages` must hold JSON"),
        (b"PAR1 and then nothing of the kind", 1, "data_type", "Parquet file cannot be read"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, content: bytes, line: int, code: str, words: str) -> None:
    path = tmp_path / "rows"
    path.write_bytes(content)
    issue = validate_file(path).issues[0]
    assert (issue.line, issue.code) == (line, code)
    assert words in issue.message


@pytest.mark.parametrize(
    "content",
    [
        "Prompt,Completion\na,b\n",
        " PROMPT ; completion \na;b\n",
        "prompt\tcompletion\ta_note\na\tb\tx\n",
        "id|prompt|completion\n7|a|b\n",
        '"prompt";"completion"\n"a";"b"\n',
    ],
)
def test_tables_of_spreadsheets_are_read_with_their_delimiters_and_capitals(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows"
    path.write_text(content, encoding="utf-8")
    assert [record.value for record in containers.read_records(path)] == [{"prompt": "a", "completion": "b"}]


def test_a_broken_first_line_does_not_make_json_lines_a_table(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", [ROWS["text"][0]] * 3)
    path.write_bytes(b"oops\n" + path.read_bytes())
    assert [(issue.line, issue.code) for issue in validate_file(path).issues] == [(1, "bad_json")]


def test_a_parquet_string_that_is_not_utf8_is_one_rows_fault(tmp_path: Path) -> None:
    good, bad = b"a", b"\xff\xfe"
    strings = pyarrow.Array.from_buffers(
        pyarrow.string(), 3, pyarrow.array([good, bad, good], pyarrow.binary()).buffers()
    )
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.table({"text": strings}), path)
    assert [(issue.line, issue.code) for issue in validate_file(path).issues] == [(2, "bad_utf8")]


def test_a_missing_quotation_mark_takes_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "MAX_ROW_BYTES", 200_000)
    path = tmp_path / "rows.csv"
    path.write_bytes(b'prompt,completion\na,b\na,"' + b"never closed\n" * 400_000)
    tracemalloc.start()
    report = validate_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [(issue.line, issue.code) for issue in report.issues] == [(2, "too_long")]
    assert peak < 2_000_000


@pytest.mark.parametrize("write", CONTAINERS)
def test_memory_does_not_grow_with_the_file(tmp_path: Path, write: Any) -> None:
    rows = [{"text": f"{n} " + "x" * 2000} for n in range(10_000)]
    path = write(tmp_path, rows)
    del rows
    if write is not as_parquet:
        assert path.stat().st_size > 20_000_000
    before = pyarrow.total_allocated_bytes()
    largest = 0
    tracemalloc.start()
    read = parquet_reader.read_rows if write is as_parquet else containers.read_records
    for number, _ in enumerate(read(path)):
        if number % 100 == 0:
            largest = max(largest, pyarrow.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert number == 9_999
    assert peak + largest < 12_000_000


def test_a_string_that_all_rows_share_is_held_once(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    rows = [{"messages": [{"role": "user", "content": "x" * 2_000_000}]}] * 50
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, store_schema=False)
    before = pyarrow.total_allocated_bytes()
    largest = 0
    for _ in parquet_reader.read_rows(path):
        largest = max(largest, pyarrow.total_allocated_bytes() - before)
    assert 2_000_000 < largest < 12_000_000


def test_a_row_of_many_megabytes_is_too_long(tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    long = "x" * (records.MAX_ROW_BYTES + 1)
    parquet.write_table(pyarrow.table({"text": ["a", long, "b"]}), path)
    assert [(issue.line, issue.code) for issue in validate_file(path).issues] == [(2, "too_long")]
