"""A file that is one JSON list: the rows of JSON Lines, one at a time, with their numbers."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from tenora.data import json_list
from tenora.data.containers import read_records
from tenora.data.dataset import validate_file

from .rows import chat


@pytest.mark.parametrize(
    "layout", [{}, {"indent": 2}, {"separators": (",", ":")}, {"indent": 0, "ensure_ascii": False}]
)
@pytest.mark.parametrize("piece", [1, 7, 64 * 1024])
def test_a_list_is_read_as_its_items(
    tmp_path: Path, layout: dict[str, Any], piece: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_list, "HEAD_BYTES", piece)  # so that every place is once the end of a piece
    rows = [chat(f'[{n}], {{naïve}} \\ "東京" 😀?') for n in range(12)] + [{"text": "x"}, 12.5e3, -120, None, [[]], "]"]
    path = tmp_path / "rows"
    path.write_text(" \n" + json.dumps(rows, **layout) + "\n ", encoding="utf-8")
    records = list(read_records(path))
    assert [record.value for record in records] == rows
    assert [record.line for record in records] == list(range(1, len(rows) + 1))


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        ("[", 1, "not JSON"),
        ('[{"text": "a"}, {"text": "b"}', 3, "no end"),
        ('[{"text": "a"}, {"text": ', 2, "not JSON"),
        ('[{"text": "a"}, ]', 2, "not JSON"),
        ('[{"text": "a"} {"text": "b"}]', 2, "',' or ']' is expected here, not '{'"),
        ('[{"text": "a"}]\n[{"text": "b"}]', 2, "follows the end of the list"),
        ('[{"text": "a", "text": "b"}, {"text": "c"}]', 1, "'text' stands twice"),
        ("[section]\nkey = value", 1, "not JSON"),
        ("[" * 200_000, 1, "deep"),
    ],
)
def test_a_broken_list_says_where(tmp_path: Path, content: str, line: int, words: str) -> None:
    path = tmp_path / "rows"
    path.write_text(content, encoding="utf-8")
    report = validate_file(path)
    assert report.issues[-1].line == line or report.issues[0].line == line
    assert words in report.summary()


def test_memory_does_not_grow_with_a_list(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    with path.open("w", encoding="utf-8") as file:
        file.write("[")
        for number in range(8000):
            file.write(f'{"," * bool(number)}{{"text": "{number} {"x" * 2000}"}}')
        file.write("]")
    tracemalloc.start()
    count = sum(1 for _ in read_records(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 8000
    assert peak < 3_000_000


def test_an_item_without_end_takes_no_more_than_a_row_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_list, "MAX_ROW_BYTES", 100_000)
    path = tmp_path / "rows"
    path.write_text('[{"text": "' + "x" * 9_000_000, encoding="utf-8")
    tracemalloc.start()
    report = validate_file(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert "too_long" in report.summary()
    assert peak < 2_000_000
