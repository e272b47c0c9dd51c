"""Virtual tokens in a training pass: keys and values (prefix tuning) or embeddings (prompt tuning) before every row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from torch import Tensor

from tenora.training.packing import PackedRows
from tenora_kernels.layout import LoraTables


class LearnedEmbeddings(NamedTuple):
    """Tokens of a stream whose embeddings are learned.

    Attributes:
        tables: hold them, and take their gradient.
        row: of the tables.
        spans: where they lie in the stream, each with its adapter's slot.
    """

    tables: LoraTables
    row: int
    spans: Sequence[tuple[slice, int]]

    def fill(self, hidden: Tensor) -> None:
        """Put them into the embedded stream [T, H], in place."""
        for span, slot in self.spans:
            hidden[span] = self.tables.a(self.row, slot).to(hidden.dtype)

    def add_gradient(self, d_hidden: Tensor) -> None:
        """From the gradient of the embedded stream [T, H] to theirs."""
        for span, slot in self.spans:
            self.tables.grad_a(self.row, slot).add_(d_hidden[span])


def behind_prefix(rows: PackedRows, count: int) -> PackedRows:
    """Rows whose positions begin after `count` virtual tokens that are not in the stream."""
    return replace(rows, positions=rows.positions + count)


def behind_prompt(rows: PackedRows, count: int) -> tuple[PackedRows, list[slice]]:
    """Rows that see `count` virtual tokens of the stream before their own.

    They are laid down once for all rows; where rows share a beginning already, at the head of that.

    Returns:
        The rows, and where virtual tokens lie in their stream.
    """
    lengths, before = np.diff(rows.cu_seqlens), np.array(rows.prefixes, np.int64)
    if (before < 0).all():
        lengths, before = np.append(0, lengths), np.append(-1, np.zeros(len(before), np.int64))
    heads = np.flatnonzero(before < 0)
    at = np.cumsum(np.append(0, lengths))[heads]  # in the stream as it is
    lengths[heads] += count
    starts = np.cumsum(np.append(0, lengths))
    places = np.repeat(at, count)
    laid = replace(
        behind_prefix(rows, count),
        input_ids=np.insert(rows.input_ids, places, 0),
        positions=np.insert(rows.positions + count, places, np.tile(np.arange(count), len(at))),
        cu_seqlens=starts,
        prefixes=tuple(before.tolist()),
        predict_at=rows.predict_at + count * np.searchsorted(at, rows.predict_at, side="right"),
    )
    return laid, [slice(int(start), int(start) + count) for start in starts[heads]]
