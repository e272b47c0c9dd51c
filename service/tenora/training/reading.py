"""A training file read line by line: which rows can be used, and what is wrong with the others. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from tenora.training.rows import ChatRow, IssueCode, Row, RowChecker, RowFormat, RowIssue

MIN_EXAMPLES = 2
"""One row to learn from and one to measure on: fewer cannot say whether training helped. Few-shot users have 5 to 50
rows, so a higher bar would shut them out."""
MAX_LISTED_ISSUES = 100
MAX_ROW_BYTES = 16 * 1024 * 1024
"""No context holds a row this long; the bound keeps memory flat for a file without line ends."""


@dataclass(slots=True)
class ValidationReport:
    """The outcome of reading a training file.

    Attributes:
        rows: rows seen (blank lines are not rows).
        format: the form of the first usable row, None if there is none.
        issues: the first 100 issues; `issue_count` and `counts` (per code) cover all of them.
    """

    rows: int = 0
    format: RowFormat | None = None
    issues: list[RowIssue] = field(default_factory=list)
    issue_count: int = 0
    counts: Counter[IssueCode] = field(default_factory=Counter)

    @property
    def ok(self) -> bool:
        """True if every row can be used."""
        return self.issue_count == 0

    def add(self, issue: RowIssue) -> None:
        """Count an issue and list it if there is room."""
        self.issue_count += 1
        self.counts[issue.code] += 1
        if len(self.issues) < MAX_LISTED_ISSUES:
            self.issues.append(issue)

    def summary(self, listed: int = 5) -> str:
        """The issues in a few sentences: the first `listed` with line and code, and how many more there are."""
        if self.ok:
            return f"{self.rows} rows, all usable."
        lines = "; ".join(f"line {issue.line}: {issue.code}: {issue.message}" for issue in self.issues[:listed])
        more = self.issue_count - min(listed, len(self.issues))
        codes = ", ".join(f"{code}: {count}" for code, count in self.counts.most_common())
        return f"{lines}" + (f" … and {more} more ({codes})." if more else "")


def usable_rows(
    path: Path, report: ValidationReport, *, max_rows: int | None, min_rows: int
) -> Iterator[tuple[int, Row]]:
    """Rows without issues, with their lines; everything else goes into `report`."""
    line = 0
    for line, raw in _lines(path):
        if max_rows is not None and report.rows == max_rows:
            report.add(RowIssue(line, "too_many_examples", f"The file has more than {max_rows} rows; split it."))
            return
        report.rows += 1
        checker = RowChecker(line)
        if raw is None:
            checker.report(
                "too_long",
                f"The line is longer than {MAX_ROW_BYTES // 2**20} MiB; one JSON object per line is expected.",
            )
        row = None if raw is None else checker.parse(raw)
        if row is not None:
            form: RowFormat = "chat" if isinstance(row, ChatRow) else "prompt_completion"
            report.format = report.format or form
            if form != report.format:
                checker.report(
                    "ambiguous_format",
                    "Rows before this one have another form; use `messages` in all rows, or `prompt` and `completion`.",
                )
        for issue in checker.issues:
            report.add(issue)
        if row is not None and not checker.issues:
            yield line, row
    if report.rows < min_rows:
        report.add(
            RowIssue(
                max(line, 1),
                "too_few_examples",
                f"The file has {report.rows} rows and needs at least {min_rows}; add examples.",
            )
        )


def _lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """Non-blank lines with their one-based numbers; None stands for a line beyond MAX_ROW_BYTES."""
    with path.open("rb") as file:
        number = 0
        while raw := file.readline(MAX_ROW_BYTES + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if len(raw) > MAX_ROW_BYTES and not raw.endswith(b"\n"):
                _skip_line(file)
                yield number, None
            elif stripped := raw.strip():
                yield number, stripped


def _skip_line(file: BinaryIO) -> None:
    while (raw := file.readline(MAX_ROW_BYTES)) and not raw.endswith(b"\n"):
        pass
