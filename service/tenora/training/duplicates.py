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
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from tenora.training.dataset import TokenizedDataset

Uint64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

SHINGLE = 5
THRESHOLD = 0.8
MAX_LISTED_PAIRS = 20
_CHUNK_TOKENS = 1_000_000
_CHUNK_PAIRS = 4_000_000
_MAX_COMPARED = 16  # candidates for one held-out example, the most promising first
_KEPT_SETS = 2048  # sets of training examples that held-out ones may share
_COMMON = (5, 0.02, 500)  # a 5-gram in more examples says nothing: at least 5, then 2% of all, at most 500
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd: a polynomial hash modulo 2⁶⁴


@dataclass(frozen=True, slots=True)
class DuplicatePair:
    """A held-out example and the training example that it is closest to, by their lines; `similarity` 1.0 is equal."""

    train_line: int
    held_out_line: int
    similarity: float


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


def near_duplicates(train: TokenizedDataset, held_out: TokenizedDataset) -> NearDuplicates:
    """Look for the held-out examples in the training examples. The same arguments give the same answer."""
    found = _equal_examples(train, held_out)
    exact = len(found)
    rest = [index for index in range(held_out.examples) if index not in found]
    found |= _similar_examples(train, held_out, rest)
    size = train.rows_per_example
    pairs = [
        DuplicatePair(int(train.lines[size * other]), int(held_out.lines[size * index]), round(similarity, 3))
        for index, (other, similarity) in sorted(found.items())[:MAX_LISTED_PAIRS]
    ]
    return NearDuplicates(len(found), exact, held_out.examples, tuple(pairs))


def _equal_examples(train: TokenizedDataset, held_out: TokenizedDataset) -> dict[int, tuple[int, float]]:
    """Held-out examples that are training examples: index → first such training example."""
    wanted = defaultdict(list)
    for index in range(held_out.examples):
        wanted[_digest(held_out, index)].append(index)
    found: dict[int, tuple[int, float]] = {}
    for other in range(train.examples):
        for index in wanted.pop(_digest(train, other), ()):
            found[index] = (other, 1.0)
    return found


def _digest(dataset: TokenizedDataset, example: int) -> bytes:
    return blake2b(_tokens(dataset, example).tobytes(), digest_size=16).digest()


def _tokens(dataset: TokenizedDataset, example: int) -> npt.NDArray[np.int32]:
    """Tokens of all rows of an example, one after the other."""
    size = dataset.rows_per_example
    return dataset.tokens[int(dataset.offsets[size * example]) : int(dataset.offsets[size * (example + 1)])]


def _similar_examples(
    train: TokenizedDataset, held_out: TokenizedDataset, examples: list[int]
) -> dict[int, tuple[int, float]]:
    """Held-out examples close to a training example: index → the closest one found and its similarity."""
    sets = {index: _shingles(_tokens(held_out, index)) for index in examples}
    known = np.unique(np.concatenate([np.zeros(0, np.uint64), *sets.values()]))
    if not len(known):
        return {}
    frequency = _frequency(train, sets, known)
    least, share, most = _COMMON
    boilerplate = known[frequency > min(max(least, share * (train.examples + held_out.examples)), most)]
    sets = {index: np.setdiff1d(shingles, boilerplate, assume_unique=True) for index, shingles in sets.items()}

    @lru_cache(_KEPT_SETS)
    def of_train(other: int) -> Uint64Array:
        return np.setdiff1d(_shingles(_tokens(train, other)), boilerplate, assume_unique=True)

    found = {}
    for index, others in sorted(_candidates(train, sets, known, frequency).items()):
        similarity, other = max((_jaccard(sets[index], of_train(other)), -other) for other in others)
        if similarity >= THRESHOLD:
            found[index] = (-other, similarity)
    return found


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


def _chunks(dataset: TokenizedDataset) -> Iterator[tuple[Uint64Array, Int64Array]]:
    """Distinct 5-grams of some examples at a time, with the example of each."""
    size = dataset.rows_per_example
    offsets = dataset.offsets[::size]
    start = 0
    while start < dataset.examples:
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


def _frequency(train: TokenizedDataset, sets: dict[int, Uint64Array], known: Uint64Array) -> Int64Array:
    """In how many examples of both sides each of `known` stands."""
    counts = np.zeros(len(known), np.int64)
    for shingles in sets.values():
        counts[np.searchsorted(known, shingles)] += 1
    for hashes, example in _chunks(train):
        places, hit = _known_places(hashes, known)
        once = np.unique(example[hit] * len(known) + places[hit])
        counts += np.bincount(once % len(known), minlength=len(known))
    return counts


def _candidates(
    train: TokenizedDataset, sets: dict[int, Uint64Array], known: Uint64Array, frequency: Int64Array
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
    for other, place in _hits(train, known, np.diff(starts)):
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


def _hits(train: TokenizedDataset, known: Uint64Array, fans: Int64Array) -> Iterator[tuple[Int64Array, Int64Array]]:
    """Training examples and the places of those of `known` that they hold and that have a fan, some at a time.

    A part has whole examples, and no more than _CHUNK_PAIRS pairs come of it, unless of a single example.
    """
    for hashes, example in _chunks(train):
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
