"""Which examples are learned and which are measured on: decided by what they hold, not by where they stand.

Each example has a rank drawn from its tokens and a seed, so equal files divide equally whatever the order of their
rows. Doubled rows and near-duplicates (`tenora.data.duplicates`)
stay on one side, over all files of a run. Where that leaves too little to measure on, because the rows are nearly all
alike, near-duplicates are parted, and at last equal rows. Free of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from tenora.data.dataset import TokenizedDataset, concatenate
from tenora.data.duplicates import Check, content_keys, groups_of_similar, nothing_ends_it
from tenora.data.labels import Labels
from tenora.errors import DatasetError

Int64Array = npt.NDArray[np.int64]
Uint64Array = npt.NDArray[np.uint64]


def divide(
    datasets: Sequence[TokenizedDataset],
    fractions: Sequence[float],
    *,
    seed: int = 0,
    check: Check = nothing_ends_it,
) -> list[tuple[TokenizedDataset, TokenizedDataset]]:
    """Of each dataset of a run the examples to train on and those to measure on, both in file order.

    Args:
        datasets: of one kind.
        fractions: the share of each that is held out; at least one example is, and one is not.
        seed: another one draws other examples.
        check: called every now and then; it may raise to end a long work.

    Raises:
        DatasetError: a dataset has fewer than two examples.
    """
    sizes = np.array([dataset.examples for dataset in datasets])
    if sizes.min() < 2:
        raise DatasetError("A single row cannot be split; add rows or give a validation file.", param="training_file")
    rows, task = concatenate(datasets), np.repeat(np.arange(len(sizes)), sizes)
    wanted = np.clip(np.round(sizes * np.array(fractions)).astype(np.int64), 1, sizes - 1)
    if rows.labels is not None and rows.labels.kind == "class":
        task, wanted = _strata(task, rows.labels, fractions)
    held_out = _held_out(rows, task, wanted, seed, check)
    starts = np.cumsum([0, *sizes[:-1]])
    divided = []
    for dataset, start, size in zip(datasets, starts, sizes, strict=True):
        own = held_out[start : start + size]
        divided.append((dataset.select(np.flatnonzero(~own)), dataset.select(np.flatnonzero(own))))
    return divided


def _strata(task: Int64Array, labels: Labels, fractions: Sequence[float]) -> tuple[Int64Array, Int64Array]:
    """The classes of each task as parts of their own: each gives its share, and keeps a row to be learned from.

    Returns:
        The part of each example, and how many of each part are held out.
    """
    _, part = np.unique(task * len(labels.names) + labels.values, return_inverse=True)
    sizes = np.bincount(part)
    of_task = np.zeros(len(sizes), np.int64)
    of_task[part] = task
    wanted = np.clip(np.round(sizes * np.array(fractions)[of_task]).astype(np.int64), 0, sizes - 1)
    for number in range(len(fractions)):
        own = np.flatnonzero(of_task == number)
        if not wanted[own].any():  # of the largest at least one
            wanted[own[sizes[own].argmax()]] = 1
    return part, wanted


def fold(rows: TokenizedDataset, folds: int, *, seed: int = 0) -> list[Int64Array]:
    """The examples that each fold of a cross-validation holds out, ascending; of like number."""
    number = np.zeros(rows.examples, np.int64)
    fair = -(-rows.examples // folds)
    units = next(units for units in _units(rows) if _can_fill(units, folds, fair))
    sizes = [0] * folds
    for members in _by_rank(units, _ranks(rows, seed)):
        smallest = sizes.index(min(sizes))
        number[members] = smallest
        sizes[smallest] += len(members)
    return [np.flatnonzero(number == index) for index in range(folds)]


def _held_out(
    rows: TokenizedDataset, task: Int64Array, wanted: Int64Array, seed: int, check: Check
) -> npt.NDArray[np.bool_]:
    """A mark on each example that is held out: units by their rank, until every task has as many as it wants.

    A unit with rows of several tasks may give one of them up to twice as many, if another has too few without it.
    """
    held_out = np.zeros(rows.examples, np.bool_)
    sizes = np.bincount(task, minlength=len(wanted))
    left = wanted.copy()
    ranks = _ranks(rows, seed, check)
    for units in _units(rows, check):
        if (left <= wanted // 2).all():
            break
        for most in (wanted, np.minimum(2 * wanted, sizes - 1)):
            for members in _by_rank(units, ranks) if (left > 0).any() else ():
                check()
                counts = np.bincount(task[members], minlength=len(left))
                fits = np.where(left > 0, counts <= left, wanted - left + counts <= most) | (counts == 0)
                if fits.all() and (left[counts > 0] > 0).any() and not held_out[members].any():
                    held_out[members] = True
                    left -= counts
                    if (left <= 0).all():
                        break
    return held_out


def _units(rows: TokenizedDataset, check: Check = nothing_ends_it) -> Iterator[Int64Array]:
    """What stays together, the number of each example's unit: near-duplicates, else equal ones, else nothing."""
    yield groups_of_similar(rows, check)
    yield np.unique(content_keys(rows, check), return_inverse=True)[1]
    yield np.arange(rows.examples)


def _can_fill(units: Int64Array, folds: int, fair: int) -> bool:
    """Whether the units make so many folds of about `fair` examples."""
    sizes = np.bincount(units)
    return len(sizes) >= folds and int(sizes.max()) <= max(fair, 2)


def _ranks(rows: TokenizedDataset, seed: int, check: Check = nothing_ends_it) -> Uint64Array:
    """A number of each example, drawn from its content and the seed (the finalizer of SplitMix64)."""
    found = content_keys(rows, check) + np.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    for shift, multiplier in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ (found >> np.uint64(shift))) * np.uint64(multiplier)
    return found ^ (found >> np.uint64(31))


def _by_rank(units: Int64Array, ranks: Uint64Array) -> Iterator[Int64Array]:
    """The members of each unit, units by their lowest rank."""
    order = np.lexsort((ranks, units))
    starts = np.flatnonzero(np.diff(units[order], prepend=-1))
    stops = [*starts[1:].tolist(), len(order)]
    for unit in np.argsort(ranks[order[starts]], kind="stable").tolist():
        yield order[int(starts[unit]) : stops[unit]]
