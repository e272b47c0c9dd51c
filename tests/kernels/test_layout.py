"""Tables and segments: what any layout must hold, found by hypothesis."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tenora_kernels.layout import LoraTables, build_segments
from tests.kernels.cases import IN, OUT, make_tables

slot_lists = st.lists(st.integers(-1, 5), max_size=60)
rank_lists = st.lists(st.lists(st.integers(0, 9), min_size=7, max_size=7), min_size=1, max_size=5)


@given(slot_lists)
def test_segments_hold_every_adapted_row_once(slots: list[int]) -> None:
    segments = build_segments(slots)
    perm = segments.perm.tolist()
    assert sorted(perm) == [t for t, slot in enumerate(slots) if slot >= 0]
    assert segments.rows == len(slots)
    assert segments.adapted == len(perm)
    assert list(segments.seg_slot) == sorted({slot for slot in slots if slot >= 0})
    assert len(segments.seg_ptr) == len(segments.seg_slot) + 1
    assert segments.seg_ptr[0] == 0
    for i, slot in enumerate(segments.seg_slot):
        rows = perm[segments.seg_ptr[i] : segments.seg_ptr[i + 1]]
        assert rows == [t for t, other in enumerate(slots) if other == slot]
    is_run = bool(perm) and perm == list(range(perm[0], perm[0] + len(perm)))
    assert segments.first == (perm[0] if is_run else None)


@given(slot_lists)
def test_segments_of_a_tensor_equal_those_of_a_list(slots: list[int]) -> None:
    from_list, from_tensor = build_segments(slots), build_segments(torch.tensor(slots, dtype=torch.int32))
    assert from_list.perm.tolist() == from_tensor.perm.tolist()
    assert (from_list.seg_ptr, from_list.seg_slot, from_list.first) == (
        from_tensor.seg_ptr,
        from_tensor.seg_slot,
        from_tensor.first,
    )


@given(rank_lists)
def test_adapters_never_overlap(ranks: list[list[int]]) -> None:
    tables = make_tables(ranks, torch.float32)
    tables.arena.zero_()
    for slot, slot_ranks in enumerate(ranks):
        for row, rank in enumerate(slot_ranks):
            assert tables.rank(row, slot) == rank
            assert tables.a(row, slot).shape == (rank, IN[row])
            assert tables.bt(row, slot).shape == (rank, OUT[row])
            tables.a(row, slot).add_(1)
            tables.bt(row, slot).add_(1)
    assert int(tables.arena.max()) <= 1, "two matrices share an element"
    assert int(tables.arena.sum()) == sum(tables.numel(slot_ranks) for slot_ranks in ranks)


def test_a_view_of_a_larger_storage_is_honoured() -> None:
    whole = torch.arange(500, dtype=torch.float32)
    tables = LoraTables.empty(whole[100:], in_features=(3,), out_features=(2,), slots=1)
    tables.place(0, 10, [2], [1.0])
    assert tables.a(0, 0).tolist() == [[110, 111, 112], [113, 114, 115]]
    assert tables.bt(0, 0).tolist() == [[116, 117], [118, 119]]


def test_place_and_clear() -> None:
    tables = LoraTables.empty(torch.zeros(100), in_features=(3, 4), out_features=(2, 5), slots=2)
    assert tables.place(1, 7, [2, 0], [0.5, 9.0]) == 10
    assert (tables.rank(0, 1), tables.scale(0, 1), tables.rank(1, 1), tables.scale(1, 1)) == (2, 0.5, 0, 0.0)
    assert tables.rank(0, 0) == 0
    with pytest.raises(ValueError, match="do not fit an arena of 100 elements"):
        tables.place(0, 95, [1, 1], [1.0, 1.0])
    with pytest.raises(ValueError, match="do not fit"):
        tables.place(0, 0, [1, -1], [1.0, 1.0])
    assert tables.rank(0, 0) == 0, "a refused adapter must leave no trace"
    tables.clear(1)
    assert not tables.ranks.any()


def test_tables_of_the_wrong_form_are_refused() -> None:
    good = LoraTables.empty(torch.zeros(10), in_features=(3,), out_features=(2,), slots=2)
    fields = {name: getattr(good, name) for name in ("arena", "ranks", "scaling", "a_offset", "b_offset")}
    sizes = {"in_features": (3,), "out_features": (2,)}
    for change, message in (
        ({"ranks": torch.zeros(1, 2)}, "ranks must be"),
        ({"scaling": torch.zeros(2, 2)}, "scaling must be"),
        ({"arena": torch.zeros(2, 5)}, "1-D floating point"),
        ({"arena": torch.zeros(10, dtype=torch.int32)}, "1-D floating point"),
        ({"grad": torch.zeros(9)}, "grad must have"),
        ({"grad": torch.zeros(10, dtype=torch.bfloat16)}, "grad must have"),
        ({"out_features": (2, 2)}, "one entry per row"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraTables(**{**fields, **sizes, **change})


@pytest.mark.parametrize("slots", [[0, -2], [[0, 1]]])
def test_slots_that_mean_nothing_are_refused(slots: list[int]) -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        build_segments(slots)
