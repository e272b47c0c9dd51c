"""Packing: every row once, nothing beyond capacity that could be split, nothing read that the loss does not need."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from tenora.data.dataset import TokenizedDataset
from tenora.data.labels import Labels
from tenora.data.rows import LABELLED, PAIRS, RowKind
from tenora.training.corpus import Corpus
from tenora.training.packing import microbatches, pack, plan_microbatches, shared_prefix, stream_length
from tests.data.rows import random_rows


@given(lengths=st.lists(st.integers(0, 60), max_size=40), capacity=st.integers(1, 64))
def test_plan_holds_each_row_once_within_capacity_and_is_first_fit(lengths: list[int], capacity: int) -> None:
    plan = plan_microbatches(lengths, capacity)
    assert sorted(index for packed in plan for index in packed) == list(range(len(lengths)))
    loads = [sum(lengths[index] for index in packed) for packed in plan]
    assert all(load <= capacity or len(packed) == 1 for load, packed in zip(loads, plan, strict=True))
    # No two microbatches would fit into one: the number of them is below twice the optimum.
    fitting = sorted(load for load in loads if load <= capacity)
    assert len(fitting) < 2 or fitting[0] + fitting[1] > capacity
    assert plan == plan_microbatches(lengths, capacity)


def labelled(labels: Labels | None, *, kind: RowKind, rows_per_example: int = 1) -> TokenizedDataset:
    """Six rows of four tokens, read at the third."""
    return TokenizedDataset(
        tokens=np.arange(24, dtype=np.int32),
        weights=np.tile(np.array([0, 0, 0, 1], np.uint8), 6),
        offsets=np.arange(0, 25, 4),
        lines=np.arange(6),
        rows_per_example=rows_per_example,
        named_kind=kind,
        labels=labels,
    )


def test_rows_bring_what_a_head_learns_of_them() -> None:
    marks = np.array([[1, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 1]], np.bool_)
    for labels, wanted in (
        (Labels("class", ("a", "b"), np.array([1, 0, 1, 1, 0, 0])), [[0.0], [1.0]]),
        (Labels("number", (), np.array([1.5, 2, 3, 4, 5.25, -6])), [[5.25], [4.0]]),
        (Labels("classes", ("a", "b"), marks), [[1.0, 0.0], [0.0, 0.0]]),
    ):
        (packed,) = microbatches(labelled(labels, kind=LABELLED), [3, 4], 100)
        assert packed.labels is not None
        assert packed.labels[::-1].tolist() == wanted
        assert packed.predict_at.tolist() == [2, 5]
    (packed,) = microbatches(labelled(None, kind=PAIRS, rows_per_example=3), [1, 0], 100, shared=1)
    assert packed.rows == (3, 4, 5, 0, 1, 2)
    assert packed.labels is not None
    assert packed.labels.tolist() == [[1, 0], [1, 1], [1, 2], [0, 0], [0, 1], [0, 2]]
    assert pack(random_rows(2, seed=1), [0, 1]).labels is None


@settings(max_examples=50)
@given(rows=st.integers(1, 9), seed=st.integers(0, 1000), capacity=st.integers(1, 80))
def test_microbatches_predict_exactly_the_learned_tokens(rows: int, seed: int, capacity: int) -> None:
    dataset = random_rows(rows, seed)
    found: list[tuple[int, int, int]] = []  # row, position of the learned token, token
    for packed in microbatches(dataset, range(rows), capacity):
        starts = packed.cu_seqlens[:-1]
        assert packed.cu_seqlens[-1] == packed.tokens
        for start, stop, row in zip(starts, packed.cu_seqlens[1:], packed.rows, strict=True):
            np.testing.assert_array_equal(packed.positions[start:stop], np.arange(stop - start))
            np.testing.assert_array_equal(packed.input_ids[start:stop], dataset.row(row)[0][: stop - start])
        for at, target, index in zip(packed.predict_at, packed.targets, packed.target_row, strict=True):
            assert starts[index] <= at < packed.cu_seqlens[index + 1]
            found.append((packed.rows[index], int(at - starts[index]) + 1, int(target)))
    expected = [
        (row, position, int(dataset.row(row)[0][position]))
        for row in range(rows)
        for position in np.flatnonzero(dataset.row(row)[1])
    ]
    assert sorted(found) == expected


def test_a_worked_example() -> None:
    dataset = TokenizedDataset(
        tokens=np.array([10, 11, 12, 13, 20, 21, 22], np.int32),
        weights=np.array([0, 0, 1, 0, 0, 1, 1], np.uint8),
        offsets=np.array([0, 4, 7]),
        lines=np.array([1, 2]),
    )
    packed = pack(dataset, [1, 0])
    assert packed.input_ids.tolist() == [20, 21, 10, 11]  # 22 is only predicted; 12 too, and 13 follows the last loss
    assert packed.positions.tolist() == [0, 1, 0, 1]
    assert packed.cu_seqlens.tolist() == [0, 2, 4]
    assert packed.predict_at.tolist() == [0, 1, 3]
    assert packed.targets.tolist() == [21, 22, 12]
    assert packed.target_row.tolist() == [0, 0, 1]


def test_a_row_without_a_learned_token_takes_no_room() -> None:
    assert stream_length(np.zeros(5, np.uint8)) == 0
    dataset = TokenizedDataset(np.arange(3, dtype=np.int32), np.zeros(3, np.uint8), np.array([0, 3]), np.array([1]))
    assert pack(dataset, [0]).tokens == 0


def corpus_of(*rows: int, weights: tuple[float, ...] = (1.0,)) -> Corpus:
    """Tasks of so many rows."""
    dataset = random_rows(sum(rows), seed=1)
    task = np.repeat(np.arange(len(rows)), rows)
    names = tuple(f"task-{number}" for number in range(len(rows)))
    return Corpus(dataset, dataset, names, weights, task, task)


@given(rows=st.integers(1, 60), batch_size=st.integers(1, 20), epoch=st.integers(0, 5), seed=st.integers(0, 99))
def test_an_epoch_sees_every_row_once_in_even_steps(rows: int, batch_size: int, epoch: int, seed: int) -> None:
    corpus = corpus_of(rows)
    steps = corpus.steps_per_epoch(batch_size)
    assert steps == -(-rows // batch_size)
    batches = [corpus.batch(step, batch_size, seed=seed) for step in range(epoch * steps, (epoch + 1) * steps)]
    assert sorted(np.concatenate(batches)) == list(range(rows))
    sizes = [len(batch) for batch in batches]
    assert max(sizes) <= batch_size
    assert max(sizes) - min(sizes) <= 1


def test_order_differs_between_epochs_and_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [row for step in range(7) for row in corpus_of(50).batch(7 * epoch + step, 8, seed=seed)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_trials_with_other_batch_sizes_and_epochs_take_turns_on_one_corpus() -> None:
    """As those of a sweep do: each gets what it would get alone."""
    shared, sizes = corpus_of(50), (4, 7, 25, 50, 3, 10)
    turns = [[shared.batch(step, size, seed=3) for size in sizes] for step in range(30)]
    for size, found in zip(sizes, zip(*turns, strict=True), strict=True):
        alone = corpus_of(50)
        assert list(found) == [alone.batch(step, size, seed=3) for step in range(30)]


def test_a_task_with_half_the_weight_gives_half_of_its_rows() -> None:
    corpus = corpus_of(40, 20, weights=(0.5, 1.0))
    seen = [set(corpus.batch(step, 40, seed=3)) for step in range(3)]
    assert [(len([row for row in batch if row < 40]), len([row for row in batch if row >= 40])) for batch in seen] == [
        (20, 20)
    ] * 3
    assert len({frozenset(batch) for batch in seen}) == 3, "every epoch draws others"
    assert "2 of task-0" in corpus.where([1])


def test_what_all_rows_begin_with_is_laid_down_once() -> None:
    tokens, weights = [], []
    for row in range(3):
        own = np.array([50 + row, 60, 70 + row, 80], dtype=np.int32)
        tokens.append(np.concatenate([np.arange(5, dtype=np.int32), own]))
        weights.append(np.array([0, 0, 0, 0, 0, 0, 0, 1, 1], dtype=np.uint8))
    offsets = np.arange(4, dtype=np.int64) * 9
    dataset = TokenizedDataset(np.concatenate(tokens), np.concatenate(weights), offsets, np.arange(1, 4))
    assert shared_prefix(dataset) == 5
    packed = pack(dataset, [2, 0], shared=5)
    assert packed.input_ids.tolist() == [0, 1, 2, 3, 4, 52, 60, 72, 50, 60, 70]
    assert packed.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7]
    assert packed.cu_seqlens.tolist() == [0, 5, 8, 11]
    assert packed.prefixes == (-1, 0, 0)
    assert packed.predict_at.tolist() == [6, 7, 9, 10]
    assert packed.targets.tolist() == [72, 80, 70, 80]
    assert packed.row_tokens == 16
    # The token that predicts the first learned one is each row's own.
    early = np.tile(np.array([0, 0, 0, 1, 1, 1, 1, 1, 1], np.uint8), 3)
    learned_early = TokenizedDataset(dataset.tokens, early, offsets, dataset.lines)
    assert shared_prefix(learned_early) == 2
    assert len(microbatches(dataset, range(3), 5 + 6, shared=5)) == 2, "the prefix is counted once a microbatch"
