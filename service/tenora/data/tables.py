"""CSV files as records. Free of torch."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from typing import Any, BinaryIO

import msgspec

from tenora.data.forms import FORMS, TABLE_KEYS, check_columns, column_names
from tenora.data.opening import BOM, not_utf8
from tenora.data.records import MAX_BLANK_LINES, MAX_ROW_BYTES, Record, unreadable
from tenora.data.rows import RowChecker, RowFormat

_DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}


def is_table(head: bytes) -> bool:
    """Whether a text file is CSV: it begins with a header, or no line in sight begins as a JSON object does."""
    lines = [line.strip() for line in head.removeprefix(BOM).split(b"\n")]
    first = next((line for line in lines if line), b"{")
    if first.startswith((b"{", b"[")):
        return False
    return any(_named(first, delimiter) for delimiter in _DELIMITERS) or not any(
        line.startswith(b"{") for line in lines
    )


def csv_records(file: BinaryIO, head: bytes) -> Iterator[Record]:
    """The records of a table; `head` are its first bytes. A fault of the header is the only one told."""
    first = next((line for line in head.removeprefix(BOM).split(b"\n") if line.strip()), b"")
    return _CsvReader(file, max(_DELIMITERS, key=lambda delimiter: len(_named(first, delimiter)))).records()


def _named(header: bytes, delimiter: str) -> frozenset[str]:
    """The keys that mean something among the cells of a header."""
    cells = header.decode("utf-8", errors="replace").split(delimiter)
    return TABLE_KEYS.intersection(column_names([cell.strip().strip('"') for cell in cells]))


class _RecordTooLongError(Exception):
    """A CSV record is longer than MAX_ROW_BYTES, mostly because a quotation mark is missing."""


class _CsvReader:
    """A table whose first record names the columns of one form. Cells are strings; lists and objects stand as JSON."""

    def __init__(self, file: BinaryIO, delimiter: str) -> None:
        self._file = file
        self._delimiter = delimiter
        self._taken = 0  # bytes of the record that is being read
        self._blank = 0
        # The limit is the process's, and its default is shorter than long documents; nothing else here reads CSV.
        csv.field_size_limit(MAX_ROW_BYTES)
        self._rows = csv.reader(self._lines(), delimiter=delimiter, strict=True)

    def records(self) -> Iterator[Record]:
        """The header's fault if it has one, else the records after it."""
        header = self._next(1)
        if not isinstance(header, list):
            yield header or unreadable(1, "missing_messages_list", "The file is empty.", last=True)
            return
        if fault := _not_utf8(header):
            yield unreadable(1, "bad_utf8", f"The first line: {fault}", last=True)
            return
        columns = column_names(header)
        checker = RowChecker(1)
        form = check_columns(columns, checker)
        if form is None:
            issue = checker.issues[0]
            hint = "The first line is neither a JSON object nor a header of columns that names one form's keys. "
            yield unreadable(1, issue.code, hint + issue.message, last=True)
            return
        number = 0
        while (cells := self._next(number + 1)) is not None:
            number += 1
            if isinstance(cells, Record):
                yield cells
                return
            yield self._record(number, columns, cells, form)

    def _next(self, number: int) -> list[str] | Record | None:
        """The next record that is not blank; None at the end, a Record if the rest cannot be read."""
        try:
            for cells in self._rows:
                self._taken = 0
                if cells:
                    return cells
                self._blank += 1
                if self._blank > MAX_BLANK_LINES:
                    message = f"The file has more than {MAX_BLANK_LINES} blank lines."
                    return unreadable(number, "data_type", message, last=True)
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
            yield (raw.removeprefix(BOM) if first else raw).decode("utf-8", errors="surrogateescape")
            first = False

    def _record(self, number: int, columns: Sequence[str], cells: Sequence[str], form: RowFormat) -> Record:
        if len(cells) != len(columns):
            message = (
                f"The record has {len(cells)} cells and the header {len(columns)}; quote cells that hold "
                f"{_DELIMITERS[self._delimiter]}."
            )
            return unreadable(number, "data_type", message)
        if fault := _not_utf8(cells):
            return unreadable(number, "bad_utf8", f"The record is not UTF-8. {fault}")
        value: dict[str, Any] = {}
        for column, cell in zip(columns, cells, strict=True):
            if column not in TABLE_KEYS or (not cell and column not in FORMS[form].required):
                continue
            value[column] = cell
            if column in FORMS[form].structured:
                try:
                    value[column] = msgspec.json.decode(cell) if cell else None
                except (msgspec.DecodeError, RecursionError) as error:
                    return unreadable(number, "bad_json", f"The cell `{column}` must hold JSON: {error}.")
        return Record(number, value)


def _not_utf8(cells: Sequence[str]) -> str | None:
    """What is to be said if a cell had bytes that are not UTF-8."""
    for cell in cells:
        try:
            cell.encode()
        except UnicodeEncodeError:
            raw = cell.encode("utf-8", errors="surrogateescape")
            try:
                raw.decode()
            except UnicodeDecodeError as error:
                return not_utf8(raw, error.start)
    return None
