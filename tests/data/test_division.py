"""Which rows are held out: by their content and the seed alone, doubled rows and near-duplicates on one side."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tenora.data.dataset import TokenizedDataset
from tenora.data.division import divide, fold
from tenora.data.duplicates import groups_of_similar, near_duplicates
from tenora.errors import DatasetError

from .rows import random_rows


def dataset(rows: list[list[int]]) -> TokenizedDataset:
    return TokenizedDataset(
        tokens=np.array([token for row in rows for token in row], dtype=np.int32),
        weights=np.ones(sum(map(len, rows)), np.uint8),
        offsets=np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64),
        lines=np.arange(1, len(rows) + 1, dtype=np.int64),
    )


def random(count: int, seed: int = 0, length: int = 60) -> list[list[int]]:
    found: list[list[int]] = np.random.default_rng(seed).integers(0, 5000, (count, length)).tolist()
    return found


def nearly(row: list[int], token: int) -> list[int]:
    """The row with one other token: 50 of 60 5-grams are shared."""
    return [*row[:30], token, *row[31:]]


def contents(part: TokenizedDataset) -> list[tuple[int, ...]]:
    return sorted(tuple(part.row(index)[0].tolist()) for index in range(len(part)))


def test_the_sides_are_the_whole_in_file_order() -> None:
    ((train, held_out),) = divide([random_rows(40, seed=2)], [0.1])
    assert (len(train), len(held_out)) == (36, 4)
    assert sorted([*train.lines, *held_out.lines]) == list(range(1, 41))
    for part in (train, held_out):
        assert part.lines.tolist() == sorted(part.lines.tolist())
    assert [len(part) for part in divide([random_rows(2, seed=0)], [0.0001])[0]] == [1, 1]
    with pytest.raises(DatasetError, match="cannot be split"):
        divide([random_rows(1, seed=0)], [0.5])


def test_the_content_decides_and_not_the_order_of_the_rows() -> None:
    rows = random(80)
    mixed = [rows[index] for index in np.random.default_rng(1).permutation(80)]
    sides = [divide([dataset(order)], [0.2])[0] for order in (rows, mixed)]
    assert contents(sides[0][1]) == contents(sides[1][1])
    folds = [
        {frozenset(contents(dataset(order).select(held_out))) for held_out in fold(dataset(order), 5)}
        for order in (rows, mixed)
    ]
    assert folds[0] == folds[1]


def test_a_seed_draws_other_rows() -> None:
    rows = dataset(random(80))
    sides = [contents(divide([rows], [0.2], seed=seed)[0][1]) for seed in (0, 1, 2)]
    assert sides[0] != sides[1] != sides[2]
    assert contents(divide([rows], [0.2], seed=1)[0][1]) == sides[1]
    assert not np.array_equal(fold(rows, 5)[0], fold(rows, 5, seed=1)[0])


@pytest.mark.parametrize("seed", range(4))
def test_doubled_and_nearly_doubled_rows_stay_on_one_side(seed: int) -> None:
    rows = random(60, seed)
    rows += [*rows[:30], *(nearly(row, 5001 + seed) for row in rows[20:50]), *rows[:10], [1, 2, 3], [1, 2, 3]]
    rows = [rows[index] for index in np.random.default_rng(seed).permutation(len(rows))]
    ((train, held_out),) = divide([dataset(rows)], [0.2], seed=seed)
    assert near_duplicates(train, held_out=held_out).count == 0
    assert 0 <= round(len(rows) * 0.2) - len(held_out) <= 3
    found = fold(dataset(rows), 5, seed=seed)
    assert sorted(np.concatenate(found)) == list(range(len(rows)))
    assert max(map(len, found)) - min(map(len, found)) <= 4
    for number, own in enumerate(found):
        others = np.concatenate([other for index, other in enumerate(found) if index != number])
        assert near_duplicates(dataset(rows).select(others), held_out=dataset(rows).select(own)).count == 0


def test_rows_of_one_task_do_not_leak_into_another() -> None:
    shared, own = random(40), [random(40, 1), random(40, 2)]
    tasks = [dataset([*shared, *own[0]]), dataset([*(nearly(row, 5001) for row in shared), *own[1]])]
    divided = divide(tasks, [0.2, 0.1])
    assert [len(held_out) for _, held_out in divided] == [16, 8]
    trained = [train for train, _ in divided]
    for _, held_out in divided:
        assert near_duplicates(*trained, held_out=held_out).count == 0


def test_near_duplicates_are_looked_for_in_all_files_and_named_with_theirs() -> None:
    rows = random(30)
    found = near_duplicates(
        dataset(random(20, 5)), dataset([rows[3], *random(9, 6)]), held_out=dataset([rows[4], nearly(rows[3], 5001)])
    )
    assert (found.count, found.exact) == (1, 0)
    assert [(pair.train_part, pair.train_line, pair.held_out_line) for pair in found.pairs] == [(1, 1, 2)]


@pytest.mark.parametrize("rows", [[[1, 2, 3]] * 20, [nearly(random(1)[0], 6000 + n) for n in range(20)]])
def test_rows_that_are_all_alike_are_divided_all_the_same(rows: list[list[int]]) -> None:
    ((train, held_out),) = divide([dataset(rows)], [0.2])
    assert (len(train), len(held_out)) == (16, 4)
    assert [len(part) for part in fold(dataset(rows), 5)] == [4] * 5


def test_pairs_are_divided_as_pairs() -> None:
    flat = random(40, length=20)
    rows = [*flat, *flat[:20]]
    pairs = TokenizedDataset(
        tokens=np.array(rows, np.int32).reshape(-1),
        weights=np.ones(60 * 20, np.uint8),
        offsets=np.arange(61, dtype=np.int64) * 20,
        lines=np.repeat(np.arange(1, 31), 2),
        rows_per_example=2,
    )
    ((train, held_out),) = divide([pairs], [0.2])
    assert (train.examples, held_out.examples) == (24, 6)
    assert near_duplicates(train, held_out=held_out).count == 0


def test_groups_are_those_of_comparing_all_with_all() -> None:
    rows = random(40, 7)
    rows += [nearly(row, 5001) for row in rows[:20]] + [nearly(nearly(row, 5001), 5002) for row in rows[:5]] + rows[30:]
    found = groups_of_similar(dataset(rows))
    sets = [{tuple(row[i : i + 5]) for i in range(len(row) - 4)} for row in rows]
    same = [[len(a & b) / len(a | b) >= 0.8 for b in sets] for a in sets]
    linked = closure(np.array(same))
    assert np.array_equal(linked, found[:, None] == found[None, :])


def closure(linked: np.ndarray) -> np.ndarray:
    """Which nodes are connected."""
    while not np.array_equal(wider := linked @ linked, linked):
        linked = wider
    return linked


@pytest.mark.parametrize("work", ["divide", "near_duplicates"])
def test_work_on_many_rows_is_ended_at_any_of_its_stages(work: str) -> None:
    """Between two checks lies no more than an example, or a chunk of tokens."""
    rows = random(30)
    others = [nearly(row, 7) for row in rows]

    def run(check: Callable[[], None]) -> None:
        if work == "divide":
            divide([dataset([*rows, *others])], [0.1], check=check)
        else:
            near_duplicates(dataset(rows), held_out=dataset(others), check=check)

    calls = 0

    def count() -> None:
        nonlocal calls
        calls += 1

    run(count)
    assert calls > 2 * 30
    for last in range(0, calls, 11):
        left = last

        def end() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise InterruptedError

        with pytest.raises(InterruptedError):
            run(end)
        assert left == -1, "it has gone on after the check"
