"""Rows of a training file as the model would see them, before anything is spent. Free of torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Literal

from tenora.data.encoding import SAYS_NOTHING, Encoded, encode_example
from tenora.data.reading import CheckedRow, ValidationReport, checked_rows
from tenora.data.rows import Label, LabelledRow, PairRow, RowChecker, RowFormat, RowIssue
from tenora.model.tokenizer import Tokenizer

Part = Literal["chosen", "rejected", "anchor", "positive", "negative"]


@dataclass(frozen=True, slots=True)
class Span:
    """A piece of text whose tokens are all learned, or all not."""

    text: str
    trained: bool


@dataclass(frozen=True, slots=True)
class PreviewRow:
    """A row, one answer of a preference, or one text of a pair.

    Attributes:
        line: see `tenora.data.rows.RowIssue`.
        part: of a preference or pair, which has an entry for each of its answers or texts.
        tokens: what the model sees; 0 if the row cannot be rendered.
        trained_tokens: how many of them are learned.
        truncated_tokens: how many were cut off before.
        spans: the text of the tokens, in order.
        issues: why the row cannot be used.
        label: of a labelled row.
    """

    line: int
    part: Part | None
    tokens: int
    trained_tokens: int
    truncated_tokens: int
    spans: Sequence[Span]
    issues: Sequence[RowIssue]
    label: Label | None = None

    @property
    def truncated(self) -> bool:
        """Whether anything was cut off."""
        return self.truncated_tokens > 0


@dataclass(frozen=True, slots=True)
class Preview:
    """Some rows of a file.

    Attributes:
        format: of the file's first usable row; None if none was seen.
        rows: in the file's order.
        has_more: whether rows follow.
    """

    format: RowFormat | None
    rows: Sequence[PreviewRow]
    has_more: bool


def preview_file(
    path: Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncate: bool = False,
    limit: int = 10,
    after: int = 0,
    max_rows: int | None = None,
) -> Preview:
    """Render and tokenize some rows of a file, usable or not.

    Args:
        path: the file; it is read from its beginning to the rows asked for.
        tokenizer: the base model's.
        max_length, truncate: as a job would have them; see `tenora.data.dataset.tokenize_file`.
        limit: how many rows.
        after: the line of the last row that was seen; 0 begins with the first.
        max_rows: rows beyond are not read; see `tenora.data.dataset.validate_file`.
    """
    report = ValidationReport()
    wanted = (checked for checked in checked_rows(path, report, max_rows=max_rows) if checked.line > after)
    shown = list(islice(wanted, limit))
    rows = [row for checked in shown for row in _preview(checked, tokenizer, max_length=max_length, truncate=truncate)]
    return Preview(report.format, rows, has_more=next(wanted, None) is not None)


def _preview(checked: CheckedRow, tokenizer: Tokenizer, *, max_length: int, truncate: bool) -> list[PreviewRow]:
    checker = RowChecker(checked.line)
    example = None
    if checked.row is not None:
        example = encode_example(checked.row, tokenizer, checker, max_length=max_length, truncate=truncate)
    if example is not None and example.says_nothing:
        checker.report("no_trainable_tokens", SAYS_NOTHING)
    issues = (*checked.issues, *checker.issues)
    if example is None:
        return [PreviewRow(checked.line, None, 0, 0, 0, (), issues)]
    row, sequences = checked.row, example.sequences
    parts: tuple[Part | None, ...] = (None,) if len(sequences) == 1 else ("chosen", "rejected")
    if isinstance(row, PairRow):
        negatives: list[Part | None] = ["negative"] * (len(sequences) - 2)
        parts = ("anchor", "positive", *negatives)
    if isinstance(row, LabelledRow | PairRow):  # the token behind the text is only the place where a head reads
        sequences = tuple((tokens[:-1], weights[:-1]) for tokens, weights in sequences)
    return [
        PreviewRow(
            line=checked.line,
            part=part,
            tokens=len(encoded[0]),
            trained_tokens=sum(encoded[1]),
            truncated_tokens=cut,
            spans=spans_of(encoded, tokenizer),
            issues=issues,
            label=row.label if isinstance(row, LabelledRow) else None,
        )
        for part, encoded, cut in zip(parts, sequences, example.cut, strict=True)
    ]


def spans_of(encoded: Encoded, tokenizer: Tokenizer) -> list[Span]:
    """The text of the tokens, divided where being learned begins or ends; together the spans are all of it.

    A character whose bytes lie on both sides of such a place belongs to what follows.
    """
    tokens, weights = encoded
    whole = tokenizer.decode(tokens, skip_special_tokens=False)
    spans: list[Span] = []
    stop = given = 0
    for weight, run in groupby(weights):
        stop += len(list(run))
        # Decoded from the beginning: some tokenizers treat the first token of a text differently.
        text = whole if stop == len(tokens) else tokenizer.decode(tokens[:stop], False).rstrip("\ufffd")
        end = max(given, min(len(text), len(whole)))
        spans.append(Span(whole[given:end], trained=bool(weight)))
        given = end
    return spans
