"""A record of a training file, before anything is known about its form. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tenora.data.rows import IssueCode, RowIssue

MAX_ROW_BYTES = 16 * 1024 * 1024
"""No context holds a row this long; the bound keeps memory flat for a file without line ends."""
MAX_BLANK_LINES = 1_000_000
"""Blank lines are no rows, whose number is bounded, and half a gibibyte of them takes minutes."""


@dataclass(frozen=True, slots=True)
class Record:
    """One record.

    Attributes:
        line: one-based: the line of a JSON Lines file, the number of the record in CSV (after the header) and Parquet.
        value: what it holds, as JSON types.
        issue: why it cannot be read; `value` is then None.
        last: nothing after it can be read.
    """

    line: int
    value: Any = None
    issue: RowIssue | None = None
    last: bool = False


def unreadable(line: int, code: IssueCode, message: str, *, last: bool = False) -> Record:
    """A record that could not be read."""
    return Record(line, issue=RowIssue(line, code, message), last=last)
