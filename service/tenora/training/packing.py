"""Rows packed into one stream of tokens, without padding and without attending across rows.

A microbatch is a stream of whole rows laid end to end; `cu_seqlens` tells attention where each one begins, so a row
sees itself only (block-diagonal, causal). Which rows share a microbatch changes nothing but the order of additions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tenora.training.dataset import TokenizedDataset

Int64Array = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PackedRows:
    """One microbatch.

    Attributes:
        rows: the packed rows, as indices into the dataset, in stream order.
        input_ids: int64 [T].
        positions: int64 [T], counted from 0 within each row.
        cu_seqlens: int64 [rows + 1], where each row begins in the stream; the last entry is T.
        predict_at: int64 [n], stream positions whose logits predict a learned token.
        targets: int64 [n], those learned tokens.
        target_row: int64 [n], index into `rows` of the row that each target belongs to.
    """

    rows: tuple[int, ...]
    input_ids: Int64Array
    positions: Int64Array
    cu_seqlens: Int64Array
    predict_at: Int64Array
    targets: Int64Array
    target_row: Int64Array

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


def pack(dataset: TokenizedDataset, rows: Sequence[int]) -> PackedRows:
    """Lay whole rows end to end, in the order given."""
    ids: list[Int64Array] = []
    predict_at: list[Int64Array] = []
    targets: list[Int64Array] = []
    lengths: list[int] = []
    for row in rows:
        tokens, weights = dataset.row(row)
        length, start = stream_length(weights), sum(lengths)
        learned = np.flatnonzero(weights[: length + 1]) if length else np.zeros(0, np.int64)
        ids.append(tokens[:length].astype(np.int64))
        predict_at.append(learned - 1 + start)
        targets.append(tokens[learned].astype(np.int64))
        lengths.append(length)
    counts = [len(target) for target in targets]
    return PackedRows(
        rows=tuple(rows),
        input_ids=_concatenate(ids),
        positions=_concatenate([np.arange(length, dtype=np.int64) for length in lengths]),
        cu_seqlens=np.concatenate([np.zeros(1, np.int64), np.cumsum(np.array(lengths, dtype=np.int64))]),
        predict_at=_concatenate(predict_at),
        targets=_concatenate(targets),
        target_row=np.repeat(np.arange(len(rows), dtype=np.int64), counts),
    )


def microbatches(dataset: TokenizedDataset, rows: Sequence[int], capacity: int) -> list[PackedRows]:
    """Pack `rows` into microbatches of at most `capacity` tokens (more only where a single row is longer)."""
    lengths = [stream_length(dataset.row(row)[1]) for row in rows]
    return [pack(dataset, [rows[index] for index in packed]) for packed in plan_microbatches(lengths, capacity)]


def epoch_batches(rows: int, batch_size: int, *, seed: int, epoch: int) -> list[Int64Array]:
    """The rows of each optimizer step of one epoch, in an order that depends on `seed` and `epoch` alone.

    The steps are as even as possible: 17 rows in batches of 8 make 6 + 6 + 5, not 8 + 8 + 1, whose last step would be
    one row's noise at full strength. Because nothing else goes into the order, a resumed run needs only its step.
    """
    order = np.random.default_rng([seed, epoch]).permutation(rows)
    return np.array_split(order, steps_per_epoch(rows, batch_size))


def steps_per_epoch(rows: int, batch_size: int) -> int:
    """Optimizer steps of one pass over `rows`."""
    return -(-rows // batch_size)


def _concatenate(parts: list[Int64Array]) -> Int64Array:
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)
