"""Near-duplicates across a split, against a search that compares every pair."""

from __future__ import annotations

import numpy as np
import pytest

from tenora.data import duplicates
from tenora.data.dataset import TokenizedDataset
from tenora.data.duplicates import DuplicatePair, near_duplicates


def dataset(rows: list[list[int]], first_line: int = 1, size: int = 1) -> TokenizedDataset:
    lines = np.repeat(np.arange(first_line, first_line + len(rows) // size, dtype=np.int64), size)
    return TokenizedDataset(
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        weights=np.ones(sum(map(len, rows)), np.uint8),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        lines=lines,
        rows_per_example=size,
    )


def random_row(rng: np.random.Generator, length: int = 60) -> list[int]:
    found: list[int] = rng.integers(0, 5000, length).tolist()
    return found


def grams(row: list[int]) -> set[tuple[int, ...]]:
    return {tuple(row[start : start + 5]) for start in range(len(row) - 4)}


def by_brute_force(train: list[list[int]], held_out: list[list[int]]) -> dict[int, float]:
    best = {}
    for index, row in enumerate(held_out):
        similarities = [
            len(grams(row) & grams(other)) / max(len(grams(row) | grams(other)), 1) if row != other else 1.0
            for other in train
        ]
        if max(similarities) >= 0.8:
            best[index] = max(similarities)
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_same_pairs_as_comparing_everything(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "_CHUNK_TOKENS", 700)  # several chunks
    monkeypatch.setattr(duplicates, "_CHUNK_PAIRS", 50)
    rng = np.random.default_rng(seed)
    train = [random_row(rng, int(rng.integers(3, 120))) for _ in range(80)]
    held_out = []
    for source in rng.integers(0, 80, 40):
        row = list(train[source])
        for _ in range(int(rng.integers(0, 4))):  # each change breaks up to five 5-grams
            row[int(rng.integers(0, len(row)))] = int(rng.integers(0, 5000))
        held_out.append(row if rng.random() < 0.8 else random_row(rng))
    expected = by_brute_force(train, held_out)
    found = near_duplicates(dataset(train), held_out=dataset(held_out, first_line=1001))
    assert 10 < len(expected) < 40
    assert found.count == len(expected)
    assert found.exact == sum(row in train for row in held_out)
    assert found.held_out == 40
    listed = {pair.held_out_line - 1001: pair.similarity for pair in found.pairs}
    assert listed == {index: round(expected[index], 3) for index in sorted(expected)[: len(listed)]}
    assert len(found.pairs) == min(20, len(expected))


def test_equal_rows_are_counted_however_short_and_common_they_are() -> None:
    rng = np.random.default_rng(0)
    train = [random_row(rng) for _ in range(30)] + [[1, 2, 3]] * 30
    found = near_duplicates(dataset(train), held_out=dataset([[1, 2, 3], [1, 2, 4]]))
    assert (found.count, found.exact) == (1, 1)
    assert found.pairs == (DuplicatePair(train_line=31, held_out_line=1, similarity=1.0),)


def test_a_shared_system_prompt_makes_no_duplicates() -> None:
    rng = np.random.default_rng(0)
    prompt = random_row(rng, 400)
    train = [prompt + random_row(rng, 30) for _ in range(100)]
    held_out = [prompt + random_row(rng, 30) for _ in range(10)]
    held_out[3] = [*train[7][:-1], 1]
    assert len(by_brute_force(train, held_out)) == 10  # by their texts alone all look alike
    found = near_duplicates(dataset(train), held_out=dataset(held_out))
    assert [(pair.train_line, pair.held_out_line) for pair in found.pairs] == [(8, 4)]


def test_a_preference_pair_is_one_example() -> None:
    rng = np.random.default_rng(0)
    prompt = random_row(rng)
    pairs = [[prompt + random_row(rng, 40), prompt + random_row(rng, 40)] for _ in range(4)]
    rows = [row for pair in pairs for row in pair]
    found = near_duplicates(dataset(rows, size=2), held_out=dataset([*pairs[2], pairs[0][0], pairs[1][1]], size=2))
    assert (found.count, found.exact, found.held_out) == (1, 1, 2)
    assert found.pairs[0].train_line == 3


def test_nothing_to_compare() -> None:
    empty, rows = dataset([]), dataset([[1, 2], [3]])
    for train, held_out in ((rows, empty), (empty, rows), (rows, dataset([[2, 1]]))):
        assert near_duplicates(train, held_out=held_out).count == 0


def test_an_example_is_compared_with_few_even_if_all_rows_come_from_few_templates(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Otherwise a large file of that kind would take hours."""
    compare, compared = duplicates._jaccard, 0

    def counted(*sets: duplicates.Uint64Array) -> float:
        nonlocal compared
        compared += 1
        return compare(*sets)

    monkeypatch.setattr(duplicates, "_jaccard", counted)
    rng = np.random.default_rng(0)
    templates = [random_row(rng, 100) for _ in range(52)]
    rows = []
    for index in range(1_872):
        row = list(templates[index % 52])
        row[int(rng.integers(0, 100))] = index
        rows.append(row)
    train, held_out = dataset(rows[:936]), dataset(rows[936:])  # 18 rows of every template on each side
    found = near_duplicates(train, held_out=held_out)
    assert found.count == 936
    assert compared <= 936 * duplicates._MAX_COMPARED
