"""A training file read row by row: which rows can be used, and what is wrong with the others. Free of torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tenora.data.containers import read_records
from tenora.data.forms import FORMS, parse_row
from tenora.data.labelled import alike
from tenora.data.rows import (
    ANSWERS,
    IssueCode,
    Row,
    RowChecker,
    RowFormat,
    RowIssue,
    RowKind,
)

MIN_EXAMPLES = 2
"""One row to learn from and one to measure on: fewer cannot say whether training helped. Few-shot users have 5 to 50
rows, so a higher bar would shut them out."""
MAX_LISTED_ISSUES = 100


@dataclass(slots=True)
class ValidationReport:
    """The outcome of reading a training file.

    Attributes:
        rows: rows seen (blank lines are not rows).
        format: the form of the first usable row, None if there is none.
        last_line: the line of the last row seen.
        complete: all of the file could be read.
        issues: the first 100 issues; `issue_count` and `counts` (per code) cover all of them.
    """

    rows: int = 0
    format: RowFormat | None = None
    last_line: int = 0
    complete: bool = True
    issues: list[RowIssue] = field(default_factory=list)
    issue_count: int = 0
    counts: Counter[IssueCode] = field(default_factory=Counter)

    @property
    def kind(self) -> RowKind:
        """What the rows are to a method."""
        return ANSWERS if self.format is None else FORMS[self.format].kind

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


@dataclass(frozen=True, slots=True)
class CheckedRow:
    """A row of a file, or why there is none.

    Attributes:
        line: see `RowIssue`.
        row: None if there are issues.
    """

    line: int
    row: Row | None
    issues: Sequence[RowIssue]


def checked_rows(path: Path, report: ValidationReport, *, max_rows: int | None = None) -> Iterator[CheckedRow]:
    """All rows of a file; what is wrong with them is in `report`, too.

    Every row must have the first one's form, of labels the same kind, and of pairs as many negatives.
    """
    usual = ""
    for record in read_records(path):
        if max_rows is not None and report.rows == max_rows:
            report.add(RowIssue(record.line, "too_many_examples", f"The file has more than {max_rows} rows; split it."))
            return
        report.rows += 1
        report.last_line = record.line
        checker = RowChecker(record.line)
        parsed = None
        if record.issue is not None:
            checker.report(record.issue.code, record.issue.message)
        else:
            parsed = parse_row(record.value, checker)
        if parsed is not None:
            report.format = report.format or parsed[0]
            if parsed[0] != report.format:
                checker.report(
                    "ambiguous_format",
                    f"The row has the form {FORMS[parsed[0]].title}, and those before it {FORMS[report.format].title}; "
                    "a file has rows of one form.",
                )
            elif not checker.issues:
                own, usual = alike(parsed[1]), usual or alike(parsed[1])
                if own != usual:
                    checker.report(
                        "ambiguous_format",
                        f"The row has {own}, and those before it {usual}; give all rows of a file the same.",
                    )
        for issue in checker.issues:
            report.add(issue)
        yield CheckedRow(record.line, None if parsed is None or checker.issues else parsed[1], checker.issues)
        if record.last:
            report.complete = False
            return


def usable_rows(
    path: Path, report: ValidationReport, *, max_rows: int | None, min_rows: int
) -> Iterator[tuple[int, Row]]:
    """Rows without issues, with their lines; everything else goes into `report`."""
    for checked in checked_rows(path, report, max_rows=max_rows):
        if checked.row is not None:
            yield checked.line, checked.row
    if report.complete and report.rows < min_rows:
        report.add(
            RowIssue(
                max(report.last_line, 1),
                "too_few_examples",
                f"The file has {report.rows} rows and needs at least {min_rows}; add examples.",
            )
        )
