"""Rows packed into one stream of tokens, without padding and without attending across rows.

A microbatch is a stream of whole rows laid end to end; `cu_seqlens` tells attention where each one begins, so a row
sees itself only (block-diagonal, causal). Which rows share a microbatch changes nothing but the order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tenora.adapters.invocation import adapted_from
from tenora.data.dataset import TokenizedDataset
from tenora.data.rows import PAIRS, PREFERENCES

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One microbatch.

    Attributes:
        rows: the packed rows, as indices into the dataset, in stream order.
        input_ids: int64 [T].
        positions: int64 [T], counted from 0 within each row, a shared prefix included.
        cu_seqlens: int64 [sequences + 1], where each sequence begins in the stream; the last entry is T. A sequence is
            a row, what a row has beyond its shared prefix, or such a prefix.
        prefixes: per sequence, the sequence whose tokens come before its own, -1 if none do.
        predict_at: int64 [n], stream positions whose logits predict a learned token.
        targets: int64 [n], those learned tokens.
        target_row: int64 [n], index into `rows` of the row that each target belongs to.
        row_tokens: tokens of the rows, as if none were shared.
        labels: float32 [rows, w], what a head learns of each row; None if the rows have none.
        adapted: bool [T], the tokens that the adapter acts on; None: all.
    """

    rows: tuple[int, ...]
    input_ids: Int64Array
    positions: Int64Array
    cu_seqlens: Int64Array
    prefixes: tuple[int, ...]
    predict_at: Int64Array
    targets: Int64Array
    target_row: Int64Array
    row_tokens: int
    labels: npt.NDArray[np.float32] | None = None
    adapted: npt.NDArray[np.bool_] | None = None

    @property
    def tokens(self) -> int:
        """T, the length of the stream."""
        return len(self.input_ids)


def stream_length(weights: npt.NDArray[np.uint8]) -> int:
    """Tokens of a row that the model has to read: those before its last learned token, which is predicted, not read.

    What follows cannot change the loss under causal attention, so it is left out.
    """
    learned = np.flatnonzero(weights)
    return int(learned[-1]) if len(learned) else 0


def plan_microbatches(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Distribute rows over as few microbatches as first-fit decreasing finds (at most 11/9 of the optimum, plus one).

    Args:
        lengths: tokens of each row.
        capacity: tokens that a microbatch may hold; a longer row gets a microbatch of its own.

    Returns:
        Indices into `lengths`, each exactly once; ascending within a microbatch, and the same for equal arguments.
    """
    bins: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda item: (-lengths[item], item)):
        fitting = next((number for number, free in enumerate(space) if lengths[index] <= free), None)
        if fitting is None:
            bins.append([index])
            space.append(capacity - lengths[index])
        else:
            bins[fitting].append(index)
            space[fitting] -= lengths[index]
    return [sorted(packed) for packed in bins]


def shared_prefix(dataset: TokenizedDataset, invocation: Sequence[int] = ()) -> int:
    """Tokens with which every row of a dataset begins and of which none is predicted, or learned from, in any row.

    Chat templates put the same system message before every conversation: its hidden states are the same in all rows,
    because attention is causal, so a microbatch may compute them once. The length is the dataset's, not the
    microbatch's, so that a row is computed the same way whatever is beside it.

    Args:
        dataset: the rows.
        invocation: tokens from which on the adapter acts (`tenora.adapters.invocation`): what is shared ends before
            them in every row.
    """
    if dataset.kind == PREFERENCES:
        return 1  # each pair has a prompt of its own
    return _common(dataset, invocation)


def _common(dataset: TokenizedDataset, invocation: Sequence[int]) -> int:
    """`shared_prefix` of the rows, whatever they belong to."""
    if len(dataset) == 0:
        return 0
    first, _ = dataset.row(0)
    length = len(first)
    for row in range(len(dataset)):
        tokens, weights = dataset.row(row)
        length = min(length, _unlearned(weights))
        if invocation:
            length = min(length, adapted_from(tokens.tolist(), invocation))
        differs = np.flatnonzero(tokens[:length] != first[:length])
        length = int(differs[0]) if len(differs) else length
    return length


def pack(
    dataset: TokenizedDataset, rows: Sequence[int], *, shared: int = 0, invocation: Sequence[int] = ()
) -> PackedRows:
    """Lay whole rows end to end, in the order given.

    Args:
        shared: this many tokens, with which all of the rows begin, are laid down once, before them. For preference
            pairs any number above 0 lays down the prompt of each pair once.
        invocation: see `shared_prefix`.
    """
    stream = _Stream(invocation)
    if shared and dataset.kind == PREFERENCES:
        for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
            pair = dataset.select(np.array([chosen // 2]))
            stream.add(dataset, [chosen, rejected], _common(pair, invocation))
    else:
        stream.add(dataset, rows, shared)
    labels = None if dataset.labels is None and dataset.kind != PAIRS else row_labels(dataset, rows)
    return stream.packed(rows, labels)


def row_labels(dataset: TokenizedDataset, rows: Sequence[int]) -> npt.NDArray[np.float32]:
    """What a head learns of each of the rows, float32 [rows, w].

    A class is its number, several are a mark for each there is, a number is itself; a text of a pair is its example and
    its part: 0 the anchor, 1 the positive, 2 a negative.
    """
    where = np.asarray(rows, dtype=np.int64)
    if dataset.labels is not None:
        return dataset.labels.values[where].astype(np.float32).reshape(len(where), -1)
    size = dataset.rows_per_example
    return np.stack([where // size, np.minimum(where % size, 2)], axis=1).astype(np.float32)


class _Stream:
    """A stream that grows sequence by sequence."""

    def __init__(self, invocation: Sequence[int]) -> None:
        self._invocation = invocation
        self._adapted: list[npt.NDArray[np.bool_]] = []
        self._ids: list[Int64Array] = []
        self._positions: list[Int64Array] = []
        self._predict_at: list[Int64Array] = []
        self._targets: list[Int64Array] = []
        self._prefixes: list[int] = []
        self._length = self._row_tokens = 0

    def add(self, dataset: TokenizedDataset, rows: Sequence[int], shared: int) -> None:
        """Lay down the first `shared` tokens once, then what each row has beyond them."""
        before = -1
        if shared:
            before = len(self._ids)
            self._sequence(dataset.row(rows[0])[0], 0, shared, -1)
        for row in rows:
            tokens, weights = dataset.row(row)
            length = stream_length(weights)
            learned = np.flatnonzero(weights[: length + 1]) if length else np.zeros(0, np.int64)
            own = min(shared, length)
            self._predict_at.append(learned - 1 - own + self._length)
            self._targets.append(tokens[learned].astype(np.int64))
            self._row_tokens += length
            self._sequence(tokens, own, length, before if own else -1)

    def _sequence(self, row: npt.NDArray[np.int32], first: int, last: int, before: int) -> None:
        """Lay down tokens [first, last) of a row."""
        positions = np.arange(first, last, dtype=np.int64)
        self._ids.append(row[first:last].astype(np.int64))
        self._positions.append(positions)
        self._prefixes.append(before)
        self._length += len(positions)
        if self._invocation:
            self._adapted.append(positions >= adapted_from(row.tolist(), self._invocation))

    def packed(self, rows: Sequence[int], labels: npt.NDArray[np.float32] | None) -> PackedRows:
        """The stream."""
        lengths = np.array([len(ids) for ids in self._ids], dtype=np.int64)
        counts = [len(target) for target in self._targets]
        return PackedRows(
            rows=tuple(rows),
            input_ids=_concatenate(self._ids),
            positions=_concatenate(self._positions),
            cu_seqlens=np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)]),
            prefixes=tuple(self._prefixes),
            predict_at=_concatenate(self._predict_at),
            targets=_concatenate(self._targets),
            target_row=np.repeat(np.arange(len(rows), dtype=np.int64), counts),
            row_tokens=self._row_tokens,
            adapted=np.concatenate(self._adapted) if self._adapted else None,
            labels=labels,
        )


def microbatches(
    dataset: TokenizedDataset,
    examples: Sequence[int],
    capacity: int,
    *,
    shared: int = 0,
    invocation: Sequence[int] = (),
) -> list[PackedRows]:
    """Pack examples into microbatches of at most `capacity` tokens (more only where a single one is longer).

    An example is one row, or a pair of them (`TokenizedDataset.rows_per_example`), which is never torn apart.

    Args:
        shared, invocation: see `pack`.
    """
    size = dataset.rows_per_example
    rows = [range(size * example, size * example + size) for example in examples]
    once = shared if size == 1 else 0
    lengths = [sum(max(stream_length(dataset.row(row)[1]) - once, 0) for row in example) for example in rows]
    return [
        pack(dataset, [row for index in packed for row in rows[index]], shared=shared, invocation=invocation)
        for packed in plan_microbatches(lengths, max(capacity - once, 1))
    ]


def _unlearned(weights: npt.NDArray[np.uint8]) -> int:
    """Tokens at the beginning of a row before the one that the first learned token is predicted from."""
    learned = np.flatnonzero(weights)
    return max(int(learned[0]) - 1, 0) if len(learned) else 0


def _concatenate(parts: list[Int64Array]) -> Int64Array:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
