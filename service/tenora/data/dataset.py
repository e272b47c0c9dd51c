"""Training files: validated row by row, then tokenized into one flat array. Free of torch.

`validate_file` looks at structure only and needs no model; it holds one row at a time. `tokenize_file` renders every
row as the serving path would, so that the model is trained on the very tokens it will see, and marks the tokens that
are learned. Nothing is dropped or cut in silence: an unusable row is an error, and truncation happens only when asked
for and is counted.
"""

from __future__ import annotations

import os
import tempfile
import zipfile
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tenora.data.encoding import SAYS_NOTHING, Example, check_opening, encode_example
from tenora.data.labels import Labels, joined
from tenora.data.reading import MIN_EXAMPLES, ValidationReport, usable_rows
from tenora.data.rows import ANSWERS, KINDS, PREFERENCES, Label, LabelledRow, Row, RowChecker, RowIssue, RowKind
from tenora.errors import DatasetError
from tenora.model.tokenizer import Tokenizer

__all__ = [
    "OtherRowsError",
    "RowIssue",
    "TokenizedDataset",
    "UnusableRowsError",
    "ValidationReport",
    "tokenize_file",
    "validate_file",
]


class OtherRowsError(DatasetError):
    """The rows are of another kind than was wanted: `found`."""

    def __init__(self, found: RowKind) -> None:
        super().__init__(f"The training file cannot be used: it holds {found.name}.", param="training_file")
        self.found = found


class UnusableRowsError(DatasetError):
    """Rows that cannot be used; `report` holds them and the message names the first lines."""

    def __init__(self, report: ValidationReport) -> None:
        super().__init__(f"The training file cannot be used. {report.summary()}", param="training_file")
        self.report = report


def validate_file(
    path: Path, tokenizer: Tokenizer | None = None, *, max_rows: int | None = None, min_rows: int = MIN_EXAMPLES
) -> ValidationReport:
    """Check the structure of a training file, one row at a time.

    Args:
        path: JSON Lines, CSV or Parquet with rows of one form (`tenora.data.forms`); in text a BOM, CRLF line ends
            and blank lines are accepted.
        tokenizer: the base model's, whose chat template says which conversations may begin with the assistant.
        max_rows: more rows than this are an issue (`too_many_examples`), and reading stops there.
        min_rows: fewer rows than this are an issue (`too_few_examples`).

    Returns:
        What was found; the file may be used if `report.ok`.
    """
    report = ValidationReport()
    for line, row in usable_rows(path, report, max_rows=max_rows, min_rows=min_rows):
        if tokenizer is not None:
            checker = RowChecker(line)
            check_opening(row, tokenizer, checker)
            for issue in checker.issues:
                report.add(issue)
    return report


def tokenize_file(
    path: Path,
    tokenizer: Tokenizer,
    *,
    max_length: int,
    truncate: bool = False,
    min_rows: int = 1,
    kind: RowKind | None = None,
) -> TokenizedDataset:
    """Render and tokenize every row; one of a preference file becomes two, the chosen and the rejected.

    A pair becomes its anchor, its positive and its negatives. Labels come under a table of the file's own.

    Args:
        tokenizer: the base model's (`tenora.model.tokenizer.Tokenizer`).
        max_length: tokens that a row may have, at most the model's context.
        truncate: cut longer rows at their right end, so that what remains starts as a served prompt does, and count
            them in `truncated`; otherwise they are an error. Pairs whose answers are then equal are left out. A row
            whose learned tokens are all cut off is an error in either case.
        kind: wants rows of this kind; None takes any.

    Raises:
        UnusableRowsError: a DatasetError that names the lines and carries the report.
        OtherRowsError: a DatasetError: the rows are of another kind than `kind`.
    """
    report = ValidationReport()
    builder = _Builder()
    for line, row in usable_rows(path, report, max_rows=None, min_rows=min_rows):
        if kind is not None and kind != report.kind:
            raise OtherRowsError(report.kind)
        checker = RowChecker(line)
        example = encode_example(row, tokenizer, checker, max_length=max_length, truncate=truncate)
        if example is not None and not checker.issues:
            builder.add(line, example, row)
        for issue in checker.issues:
            report.add(issue)
    dataset = builder.build(report.kind)
    if dataset.left_out and not dataset.examples:
        report.add(RowIssue(report.last_line, "no_trainable_tokens", f"All {dataset.left_out} pairs: {SAYS_NOTHING}"))
    if not report.ok:
        raise UnusableRowsError(report)
    return dataset


@dataclass(frozen=True, slots=True)
class TokenizedDataset:
    """Rows as one flat stream. Row i is `tokens[offsets[i]:offsets[i + 1]]`.

    Attributes:
        tokens: int32 [N].
        weights: uint8 [N]; 1 means that this token is learned, predicted from those before it. The first token of a row
            never is: nothing precedes it.
        offsets: int64 [rows + 1].
        lines: int64 [rows], the one-based line of each row in its file.
        truncated: how many rows were cut to fit.
        left_out: how many pairs were not taken, because their answers are equal as the model sees them; not stored.
        rows_per_example: 1; 2 for preference pairs, whose rows 2i and 2i + 1 are the chosen and the rejected answer; of
            pairs of texts 2 and the number of their negatives.
        named_kind: see `kind`.
        labels: of labelled rows, one for each example.
    """

    tokens: npt.NDArray[np.int32]
    weights: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    lines: npt.NDArray[np.int64]
    truncated: int = 0
    rows_per_example: int = 1
    left_out: int = 0
    named_kind: RowKind | None = None
    labels: Labels | None = None

    @property
    def kind(self) -> RowKind:
        """What the rows are to a method; those that were stored without it are answers or preferences."""
        return self.named_kind or (PREFERENCES if self.rows_per_example == 2 else ANSWERS)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.offsets) - 1

    @property
    def examples(self) -> int:
        """What is learned as one: a row, or a pair of them."""
        return len(self) // self.rows_per_example

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        """Tokens that are learned in one pass over all rows."""
        return int(self.weights.sum(dtype=np.int64))

    def row(self, index: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Views of row `index`: tokens and weights."""
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return self.tokens[span], self.weights[span]

    def select(self, examples: npt.NDArray[np.int64]) -> TokenizedDataset:
        """A copy of the given examples, in that order; the rows of one stay together."""
        size = self.rows_per_example
        rows = (examples[:, None] * size + np.arange(size)).reshape(-1)
        picked = [self.row(int(index)) for index in rows]
        lengths = np.array([len(tokens) for tokens, _ in picked], dtype=np.int64)
        return TokenizedDataset(
            tokens=np.concatenate([tokens for tokens, _ in picked] or [np.zeros(0, np.int32)]),
            weights=np.concatenate([weights for _, weights in picked] or [np.zeros(0, np.uint8)]),
            offsets=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]),
            lines=self.lines[rows],
            truncated=self.truncated,
            rows_per_example=size,
            named_kind=self.named_kind,
            labels=None if self.labels is None else self.labels.select(examples),
        )

    def _arrays(self) -> dict[str, npt.NDArray[Any]]:
        """What is stored, by name."""
        found: dict[str, npt.NDArray[Any]] = {
            "tokens": self.tokens,
            "weights": self.weights,
            "offsets": self.offsets,
            "lines": self.lines,
            "truncated": np.array(self.truncated, np.int64),
            "rows_per_example": np.array(self.rows_per_example, np.int64),
            "kind": np.array(self.kind.key),
        }
        return found if self.labels is None else found | self.labels.to_arrays()

    def save(self, path: Path) -> None:
        """Write an .npz file at `path`, atomically: a reader sees the whole file or none."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".tokens-", suffix=".npz", delete=False) as file:
            try:
                np.savez(file, allow_pickle=False, **self._arrays())
                file.flush()
                os.fsync(file.fileno())
                Path(file.name).replace(path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise

    @classmethod
    def load(cls, path: Path) -> TokenizedDataset:
        """Read what `save` wrote.

        Raises:
            DatasetError: the file is missing or is not a whole dataset.
        """
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                dataset = cls(
                    tokens=stored["tokens"].astype(np.int32, copy=False),
                    weights=stored["weights"].astype(np.uint8, copy=False),
                    offsets=stored["offsets"].astype(np.int64, copy=False),
                    lines=stored["lines"].astype(np.int64, copy=False),
                    truncated=int(stored["truncated"]),
                    rows_per_example=int(stored["rows_per_example"]),
                    named_kind=KINDS[str(stored["kind"])] if "kind" in stored else None,
                    labels=Labels.from_arrays(stored),
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise DatasetError(
                f"The tokenized dataset {path.name} cannot be read ({error}); prepare the job again."
            ) from error
        ends = (int(dataset.offsets[0]), int(dataset.offsets[-1])) if len(dataset.offsets) else (-1, -1)
        whole = (
            ends == (0, len(dataset.tokens))
            and len(dataset.weights) == len(dataset.tokens)
            and len(dataset.lines) == len(dataset)
            and (dataset.labels is None or len(dataset.labels) == dataset.examples)
        )
        if not whole or bool((np.diff(dataset.offsets) < 0).any()):
            raise DatasetError(f"The tokenized dataset {path.name} contradicts itself; prepare the job again.")
        return dataset


def concatenate(datasets: Sequence[TokenizedDataset]) -> TokenizedDataset:
    """The rows of several datasets of one kind, and under one table of labels, one after the other."""
    starts = np.cumsum([0, *(len(dataset.tokens) for dataset in datasets)])
    offsets = [dataset.offsets[1:] + start for dataset, start in zip(datasets, starts[:-1], strict=True)]
    return TokenizedDataset(
        tokens=np.concatenate([dataset.tokens for dataset in datasets]),
        weights=np.concatenate([dataset.weights for dataset in datasets]),
        offsets=np.concatenate([np.zeros(1, np.int64), *offsets]),
        lines=np.concatenate([dataset.lines for dataset in datasets]),
        truncated=sum(dataset.truncated for dataset in datasets),
        rows_per_example=datasets[0].rows_per_example,
        named_kind=datasets[0].named_kind,
        labels=joined([dataset.labels for dataset in datasets if dataset.labels is not None])
        if datasets[0].labels is not None
        else None,
    )


class _Builder:
    """Grows a dataset row by row in compact arrays: five bytes a token, not a Python object."""

    def __init__(self) -> None:
        self._truncated = self._left_out = 0
        self._tokens, self._weights = array("i"), array("B")
        self._offsets, self._lines = array("q", [0]), array("q")
        self._labels: list[Label] = []
        self._rows_per_example = 0

    def add(self, line: int, example: Example, row: Row) -> None:
        if example.says_nothing:
            self._left_out += 1
            return
        for tokens, weights in example.sequences:
            self._tokens.extend(tokens)
            self._weights.extend(weights)
            self._offsets.append(len(self._tokens))
            self._lines.append(line)
        self._truncated += example.truncated
        self._rows_per_example = len(example.sequences)
        if isinstance(row, LabelledRow):
            self._labels.append(row.label)

    def build(self, kind: RowKind) -> TokenizedDataset:
        return TokenizedDataset(
            tokens=np.array(self._tokens, dtype=np.int32),
            weights=np.array(self._weights, dtype=np.uint8),
            offsets=np.array(self._offsets, dtype=np.int64),
            lines=np.array(self._lines, dtype=np.int64),
            truncated=self._truncated,
            rows_per_example=self._rows_per_example or kind.sequences,
            left_out=self._left_out,
            named_kind=kind,
            labels=Labels.of(self._labels) if self._labels else None,
        )
