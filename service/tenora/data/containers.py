"""Training files as records, one at a time: JSON Lines, a JSON list, CSV or Parquet, told apart by their content.

Memory does not grow with the file: text is read line by line, Parquet batch by batch. Whatever the bytes are, what
comes of them is records. Free of torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tenora.data.json_list import is_json_list, json_list_items
from tenora.data.opening import BOM, UnreadableError, not_utf8, open_text
from tenora.data.parquet import MAGIC, read_parquet
from tenora.data.records import MAX_BLANK_LINES, MAX_ROW_BYTES, Record, unreadable
from tenora.data.tables import csv_records, is_table


def read_records(path: Path) -> Iterator[Record]:
    """The records of a training file. Blank lines are none."""
    line = 0
    try:
        for record in _records(path):
            line = record.line
            yield record
    except UnreadableError as error:
        yield unreadable(line + 1, error.code, error.message, last=True)


def _records(path: Path) -> Iterator[Record]:
    with path.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            yield from read_parquet(path)
            return
        file.seek(0)
        text, head = open_text(file)
        if is_json_list(head):
            for number, item in enumerate(json_list_items(text), 1):
                yield _json_record(number, item)
        elif is_table(head):
            yield from csv_records(text, head)
        else:
            yield from _json_lines(text)


def _json_lines(file: BinaryIO) -> Iterator[Record]:
    """One JSON value a line. A line beyond MAX_ROW_BYTES is skipped without being held."""
    number = blank = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM)
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (raw := file.readline(MAX_ROW_BYTES)) and not raw.endswith(b"\n"):
                pass
            message = f"The line is longer than {MAX_ROW_BYTES // 2**20} MiB; one JSON object per line is expected."
            yield unreadable(number, "too_long", message)
        elif stripped := raw.strip():
            try:
                yield _json_record(number, stripped.decode())
            except UnicodeDecodeError as error:
                yield unreadable(number, "bad_utf8", not_utf8(stripped, error.start))
        elif (blank := blank + 1) > MAX_BLANK_LINES:
            yield unreadable(number, "data_type", f"The file has more than {MAX_BLANK_LINES} blank lines.", last=True)
            return


def _json_record(number: int, text: str) -> Record:
    try:
        value = msgspec.json.decode(text)
        _NO_KEY_TWICE.decode(text)
    except _KeyTwiceError as error:
        message = f"The key {error.key[:40]!r} stands twice in one object; which of the two counts is not said."
        return unreadable(number, "bad_json", message)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        enclosed = text in ("{", "]", "],")
        hint = " One object per line is expected, or the whole file as one list." if enclosed else ""
        return unreadable(number, "bad_json", f"The line is not a JSON object: {error}.{hint}")
    return Record(number, value)


class _KeyTwiceError(Exception):
    """A JSON object has a key twice; JSON's readers take the last one in silence."""

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _KeyTwiceError(key)
            seen.add(key)
    return made


_NO_KEY_TWICE = json.JSONDecoder(object_pairs_hook=_object, strict=False)
