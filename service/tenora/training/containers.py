"""Training files as records, one at a time: JSON Lines, CSV or Parquet, told apart by their content. Free of torch.

Memory does not grow with the file: a text file is read line by line, Parquet batch by batch.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from tenora.training.forms import FORM_KEYS, FORMS, check_columns
from tenora.training.parquet import MAGIC, read_parquet
from tenora.training.records import MAX_ROW_BYTES, Record, unreadable
from tenora.training.rows import RowChecker, RowFormat

_BOM = b"\xef\xbb\xbf"
_SEEN_BYTES = 64 * 1024


def read_records(path: Path) -> Iterator[Record]:
    """The records of a training file. Blank lines are none."""
    with path.open("rb") as file:
        head = file.read(_SEEN_BYTES)
        file.seek(0)
        if head.startswith(MAGIC):
            yield from read_parquet(path)
        elif _is_table(head):
            yield from _CsvReader(file).records()
        else:
            yield from _json_records(file)


def _is_table(head: bytes) -> bool:
    """Whether a text file is CSV: it begins with a header, or no line in sight begins as a JSON object does."""
    lines = [line.strip() for line in head.removeprefix(_BOM).split(b"\n")]
    first = next((line for line in lines if line), b"{")
    if first.startswith((b"{", b"[")):
        return False
    names = {cell.strip().strip('"') for cell in first.decode("utf-8", errors="replace").split(",")}
    return bool(names & FORM_KEYS) or not any(line.startswith(b"{") for line in lines)


def _json_records(file: BinaryIO) -> Iterator[Record]:
    """One JSON value a line. A line beyond MAX_ROW_BYTES is skipped without being held."""
    number = 0
    while raw := file.readline(MAX_ROW_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(_BOM)
        if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
            while (raw := file.readline(MAX_ROW_BYTES)) and not raw.endswith(b"\n"):
                pass
            message = f"The line is longer than {MAX_ROW_BYTES // 2**20} MiB; one JSON object per line is expected."
            yield unreadable(number, "too_long", message)
        elif stripped := raw.strip():
            yield _json_record(number, stripped)


def _json_record(number: int, raw: bytes) -> Record:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        return unreadable(number, "bad_utf8", f"Byte {error.start + 1} is not UTF-8; save the file as UTF-8.")
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError) as error:
        enclosed = text in ("[", "]", "],")
        hint = " The file must be JSON Lines: one object per line, no enclosing list." if enclosed else ""
        return unreadable(number, "bad_json", f"The line is not a JSON object: {error}.{hint}")
    return Record(number, value)


class _RecordTooLongError(Exception):
    """A CSV record is longer than MAX_ROW_BYTES, mostly because a quotation mark is missing."""


class _CsvReader:
    """A table whose first record names the columns of one form. Cells are strings; lists and objects stand as JSON."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._taken = 0  # bytes of the record that is being read
        # The limit is the process's, and its default is shorter than long documents; nothing else here reads CSV.
        csv.field_size_limit(MAX_ROW_BYTES)
        self._rows = csv.reader(self._lines(), strict=True)

    def records(self) -> Iterator[Record]:
        """The header's fault if it has one, else the records after it."""
        header = self._next(1)
        if not isinstance(header, list):
            yield header or unreadable(1, "missing_messages_list", "The file is empty.", last=True)
            return
        columns = [name.strip() for name in header]
        checker = RowChecker(1)
        form = check_columns(columns, checker)
        if form is None:
            issue = checker.issues[0]
            hint = "The first line is neither a JSON object nor a comma-separated header that names one form's keys. "
            yield unreadable(1, issue.code, hint + issue.message, last=True)
            return
        number = 0
        while (cells := self._next(number + 1)) is not None:
            number += 1
            if isinstance(cells, Record):
                yield cells
                return
            yield _csv_record(number, columns, cells, form)

    def _next(self, number: int) -> list[str] | Record | None:
        """The next record that is not blank; None at the end, a Record if the rest cannot be read."""
        try:
            for cells in self._rows:
                self._taken = 0
                if cells:
                    return cells
        except _RecordTooLongError:
            message = f"The record is longer than {MAX_ROW_BYTES // 2**20} MiB; is a quotation mark missing?"
            return unreadable(number, "too_long", message, last=True)
        except csv.Error as error:
            message = f"The record is not CSV ({error}), and what follows it was not read; quote cells with commas."
            return unreadable(number, "data_type", message, last=True)
        return None

    def _lines(self) -> Iterator[str]:
        first = True
        while raw := self._file.readline(MAX_ROW_BYTES + 1):
            self._taken += len(raw)
            if self._taken > MAX_ROW_BYTES:
                raise _RecordTooLongError
            # Bytes that are not UTF-8 are kept as surrogates until it is known which record they stand in.
            yield (raw.removeprefix(_BOM) if first else raw).decode("utf-8", errors="surrogateescape")
            first = False


def _csv_record(number: int, columns: list[str], cells: list[str], form: RowFormat) -> Record:
    if len(cells) != len(columns):
        message = f"The record has {len(cells)} cells and the header {len(columns)}; quote cells that hold commas."
        return unreadable(number, "data_type", message)
    try:
        "".join(cells).encode()
    except UnicodeEncodeError:
        return unreadable(number, "bad_utf8", "The record is not UTF-8; save the file as UTF-8.")
    value: dict[str, Any] = {}
    for column, cell in zip(columns, cells, strict=True):
        if column not in FORMS[form].keys or (not cell and column in FORMS[form].optional):
            continue
        value[column] = cell
        if column in FORMS[form].structured:
            try:
                value[column] = msgspec.json.decode(cell) if cell else None
            except (msgspec.DecodeError, RecursionError) as error:
                return unreadable(number, "bad_json", f"The cell `{column}` must hold JSON: {error}.")
    return Record(number, value)
