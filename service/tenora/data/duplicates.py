"""Held-out examples that training all but shows: near-duplicates between the two sides. Free of torch.

Two examples are near-duplicates if the Jaccard similarity of their sets of token 5-grams is at least 0.8 (Lee et al.
2022, "Deduplicating Training Data Makes Language Models Better"). 5-grams that many examples share, such as those of a
system prompt, say nothing about what an example holds and are left out. The search is exact, not sketched: of an
example's n 5-grams, n - ⌈0.8 n⌉ + 1 are looked up in the other side, and at least one of any so many is in every
near-duplicate (prefix filtering, Chaudhuri et al. 2006). The rarest are taken, so few candidates have to be compared.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tenora.data.dataset import TokenizedDataset, concatenate

Uint64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

Check = Callable[[], None]
"""Called every now and then in work as long as a file; it may raise to end it."""


def nothing_ends_it() -> None:
    """The check of work that somebody waits for."""


SHINGLE = 5
THRESHOLD = 0.8
MAX_LISTED_PAIRS = 20
_CHUNK_TOKENS = 1_000_000
_CHUNK_PAIRS = 4_000_000
_MAX_COMPARED = 16  # candidates for one held-out example, the most promising first
_KEPT_SETS = 2048  # sets of training examples that held-out ones may share
_COMMON = (5, 0.02, 500)  # a 5-gram in more examples says nothing: at least 5, then 2% of all, at most 500
_MAX_GROUPED = (10_000, 4_000_000)  # distinct examples and their tokens; in more, only equal ones are one group
_SHARED = (5, 0.2, 500)  # likewise _COMMON, where all examples are looked for in each other
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd: a polynomial hash modulo 2⁶⁴


@dataclass(frozen=True, slots=True)
class DuplicatePair:
    """A held-out example and the training example that it is closest to, by their lines; `similarity` 1.0 is equal.

    Attributes:
        train_part: which of the training datasets `train_line` is of.
    """

    train_line: int
    held_out_line: int
    similarity: float
    train_part: int = 0


@dataclass(frozen=True, slots=True)
class NearDuplicates:
    """What was found.

    Attributes:
        count: held-out examples with at least one near-duplicate among the training examples.
        exact: how many of them are equal to one, token by token.
        held_out: how many held-out examples there are.
        pairs: the first of them, in held-out order.
    """

    count: int = 0
    exact: int = 0
    held_out: int = 0
    pairs: tuple[DuplicatePair, ...] = ()


def near_duplicates(
    *parts: TokenizedDataset, held_out: TokenizedDataset, check: Check = nothing_ends_it
) -> NearDuplicates:
    """Look for the held-out examples in the training examples of all `parts`. Equal arguments give equal answers."""
    train = concatenate(parts)
    ends = np.cumsum([part.examples for part in parts])
    found = _equal_examples(train, held_out, check)
    exact = len(found)
    rest = [index for index in range(held_out.examples) if index not in found]
    found |= _similar_examples(train, held_out, rest, check)
    size = train.rows_per_example
    pairs = [
        DuplicatePair(
            int(train.lines[size * other]),
            int(held_out.lines[size * index]),
            round(similarity, 3),
            int(np.searchsorted(ends, other, side="right")),
        )
        for index, (other, similarity) in sorted(found.items())[:MAX_LISTED_PAIRS]
    ]
    return NearDuplicates(len(found), exact, held_out.examples, tuple(pairs))


def content_keys(dataset: TokenizedDataset, check: Check = nothing_ends_it) -> Uint64Array:
    """A 64-bit hash of the tokens of each example; equal ones have equal keys. uint64 [examples]."""
    digests = [_digest(dataset, index)[:8] for index in _watched(range(dataset.examples), check)]
    return np.frombuffer(b"".join(digests), dtype="<u8")


def groups_of_similar(dataset: TokenizedDataset, check: Check = nothing_ends_it) -> Int64Array:
    """A number for each example, the same for equal ones and for those that near-duplicates link. int64 [examples].

    In large datasets only equal ones are found: comparing all with all has its price.
    """
    _, first, numbers = np.unique(content_keys(dataset, check), return_index=True, return_inverse=True)
    distinct = dataset.select(first)
    if distinct.examples > _MAX_GROUPED[0] or distinct.num_tokens > _MAX_GROUPED[1]:
        return numbers.astype(np.int64)
    group = list(range(len(first)))

    def root(index: int) -> int:
        while group[index] != index:
            group[index] = group[group[index]]
            index = group[index]
        return index

    everyone = range(distinct.examples)
    for index, other, _ in _similar_pairs(distinct, distinct, everyone, check, common=_SHARED):
        low, high = sorted((root(index), root(other)))
        group[high] = low
    return np.array([root(index) for index in everyone], np.int64)[numbers]


def _equal_examples(train: TokenizedDataset, held_out: TokenizedDataset, check: Check) -> dict[int, tuple[int, float]]:
    """Held-out examples that are training examples: index → first such training example."""
    wanted = defaultdict(list)
    for index in range(held_out.examples):
        wanted[_digest(held_out, index)].append(index)
    found: dict[int, tuple[int, float]] = {}
    for other in _watched(range(train.examples), check):
        for index in wanted.pop(_digest(train, other), ()):
            found[index] = (other, 1.0)
    return found


def _watched(indices: Sequence[int], check: Check) -> Iterator[int]:
    """The indices, with a check before each."""
    for index in indices:
        check()
        yield index


def _digest(dataset: TokenizedDataset, example: int) -> bytes:
    return blake2b(_tokens(dataset, example).tobytes(), digest_size=16).digest()


def _tokens(dataset: TokenizedDataset, example: int) -> npt.NDArray[np.int32]:
    """Tokens of all rows of an example, one after the other."""
    size = dataset.rows_per_example
    return dataset.tokens[int(dataset.offsets[size * example]) : int(dataset.offsets[size * (example + 1)])]


def _similar_examples(
    train: TokenizedDataset, held_out: TokenizedDataset, examples: Sequence[int], check: Check
) -> dict[int, tuple[int, float]]:
    """Held-out examples close to a training example: index → the closest one found and its similarity."""
    found: dict[int, tuple[int, float]] = {}
    for index, other, similarity in _similar_pairs(train, held_out, examples, check, common=_COMMON):
        if index not in found or (similarity, -other) > (found[index][1], -found[index][0]):
            found[index] = (other, similarity)
    return found


def _similar_pairs(
    train: TokenizedDataset,
    held_out: TokenizedDataset,
    examples: Sequence[int],
    check: Check,
    *,
    common: tuple[int, float, int],
) -> Iterator[tuple[int, int, float]]:
    """Held-out examples, training examples that are close to them, and how close; of each the most promising ones.

    Args:
        examples: the held-out ones to look for; if both sides are one dataset, an example is not its own duplicate.
        common: which 5-grams say nothing, see _COMMON.
    """
    sets = {index: _shingles(_tokens(held_out, index)) for index in _watched(examples, check)}
    everything = np.sort(np.concatenate([np.zeros(0, np.uint64), *sets.values()]))
    if not len(everything):
        return
    first = np.flatnonzero(np.diff(everything, prepend=~everything[:1]))
    known, frequency = everything[first], np.diff(first, append=len(everything))
    alone = train is held_out
    if not alone:
        frequency += _frequency(train, known, check)
    least, share, most = common
    total = train.examples + (0 if alone else held_out.examples)
    boilerplate = known[frequency > min(max(least, share * total), most)]
    sets = {index: np.setdiff1d(shingles, boilerplate, assume_unique=True) for index, shingles in sets.items()}
    if alone:  # a near-duplicate of another shares most of its 5-grams with something
        shared = known[frequency > 1]
        sets = {
            index: shingles
            for index, shingles in sets.items()
            if len(np.intersect1d(shingles, shared, assume_unique=True)) >= max(THRESHOLD * len(shingles), 1)
        }
    if not sets:
        return

    @lru_cache(_KEPT_SETS)
    def of_train(other: int) -> Uint64Array:
        return np.setdiff1d(_shingles(_tokens(train, other)), boilerplate, assume_unique=True)

    for index, others in sorted(_candidates(train, sets, known, frequency, check).items()):
        for other in _watched(others, check):
            if alone and other == index:
                continue
            similarity = _jaccard(sets[index], of_train(other))
            if similarity >= THRESHOLD:
                yield index, other, similarity


def _shingles(tokens: npt.NDArray[np.int32]) -> Uint64Array:
    """The set of hashed 5-grams, ascending."""
    distinct: Uint64Array = np.unique(_hashes(tokens))
    return distinct


def _hashes(tokens: npt.NDArray[np.int32]) -> Uint64Array:
    """The hash of the 5-gram that begins at each place where one does."""
    values = tokens.astype(np.uint64) + np.uint64(1)
    hashes = np.zeros(max(len(values) - SHINGLE + 1, 0), np.uint64)
    for place in range(SHINGLE):
        hashes = hashes * _MULTIPLIER + values[place : place + len(hashes)]
    hashes ^= hashes >> np.uint64(29)
    return hashes * _MULTIPLIER


def _chunks(dataset: TokenizedDataset, check: Check) -> Iterator[tuple[Uint64Array, Int64Array]]:
    """Distinct 5-grams of some examples at a time, with the example of each."""
    size = dataset.rows_per_example
    offsets = dataset.offsets[::size]
    start = 0
    while start < dataset.examples:
        check()
        stop = int(np.searchsorted(offsets, offsets[start] + _CHUNK_TOKENS, side="right")) - 1
        stop = min(max(stop, start + 1), dataset.examples)
        hashes = _hashes(dataset.tokens[int(offsets[start]) : int(offsets[stop])])
        places = np.arange(len(hashes), dtype=np.int64) + offsets[start]
        example = np.searchsorted(offsets[start : stop + 1], places, side="right") - 1 + start
        whole = places + SHINGLE <= offsets[example + 1]  # within its example
        yield hashes[whole], example[whole]
        start = stop


def _known_places(hashes: Uint64Array, known: Uint64Array) -> tuple[Int64Array, npt.NDArray[np.bool_]]:
    places = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
    return places, known[places] == hashes


def _frequency(train: TokenizedDataset, known: Uint64Array, check: Check) -> Int64Array:
    """In how many examples each of `known` stands."""
    counts = np.zeros(len(known), np.int64)
    for hashes, example in _chunks(train, check):
        places, hit = _known_places(hashes, known)
        once = np.unique(example[hit] * len(known) + places[hit])
        counts += np.bincount(once % len(known), minlength=len(known))
    return counts


def _candidates(
    train: TokenizedDataset,
    sets: dict[int, Uint64Array],
    known: Uint64Array,
    frequency: Int64Array,
    check: Check,
) -> dict[int, list[int]]:
    """For each held-out example the training examples that share one of its rarest 5-grams, most shared first."""
    looked_up: list[Int64Array] = []
    owners: list[Int64Array] = []
    for index, shingles in sets.items():
        places = np.searchsorted(known, shingles)
        rarest = places[np.argsort(frequency[places], kind="stable")]
        kept = rarest[: len(rarest) - math.ceil(THRESHOLD * len(rarest)) + 1]
        looked_up.append(kept)
        owners.append(np.full(len(kept), index, np.int64))
    place_of, owner_of = np.concatenate(looked_up), np.concatenate(owners)
    order = np.argsort(place_of, kind="stable")
    place_of, owner_of = place_of[order], owner_of[order]
    starts = np.searchsorted(place_of, np.arange(len(known) + 1))
    ranked: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for other, place in _hits(train, known, np.diff(starts), check):
        fan = starts[place + 1] - starts[place]
        within = np.arange(int(fan.sum())) - np.repeat(np.cumsum(fan) - fan, fan)
        owner = owner_of[np.repeat(starts[place], fan) + within]
        pairs, counts = np.unique(owner * train.examples + np.repeat(other, fan), return_counts=True)
        order = np.lexsort((-counts, pairs // train.examples))
        owners_in_order = pairs[order] // train.examples
        rank = np.arange(len(pairs)) - np.searchsorted(owners_in_order, owners_in_order)
        picked = order[rank < _MAX_COMPARED]
        for pair, count in zip(pairs[picked].tolist(), counts[picked].tolist(), strict=True):
            ranked[pair // train.examples].append((-count, pair % train.examples))
    return {index: [other for _, other in sorted(found)[:_MAX_COMPARED]] for index, found in ranked.items()}


def _hits(
    train: TokenizedDataset, known: Uint64Array, fans: Int64Array, check: Check
) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Training examples and the places of those of `known` that they hold and that have a fan, some at a time.

    A part has whole examples, and no more than _CHUNK_PAIRS pairs come of it, unless of a single example.
    """
    for hashes, example in _chunks(train, check):
        places, hit = _known_places(hashes, known)
        hit &= fans[places] > 0
        once = np.unique(example[hit] * len(known) + places[hit])
        other, place = once // len(known), once % len(known)
        part = np.cumsum(fans[place]) // _CHUNK_PAIRS
        part = part[np.searchsorted(other, other)]  # an example lies where its first 5-gram does
        edges = [0, *(np.flatnonzero(np.diff(part)) + 1).tolist(), len(once)]
        for start, stop in pairwise(edges):
            yield other[start:stop], place[start:stop]


def _jaccard(left: Uint64Array, right: Uint64Array) -> float:
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / max(len(left) + len(right) - shared, 1)
