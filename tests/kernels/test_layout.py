"""Tables and segments: what any layout must hold, found by hypothesis."""

from __future__ import annotations

import numpy as np
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
    adapted = [slot for slot in slots if slot >= 0]
    in_order = list(dict.fromkeys(adapted))
    lie_together = sorted(adapted, key=in_order.index) == adapted
    assert list(segments.seg_slot) == (in_order if lie_together else sorted(in_order))
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


@given(rank_lists, st.integers(1, 6))
def test_bfloat16_and_float32_slots_never_overlap(ranks: list[list[int]], alignment: int) -> None:
    """Every other slot holds bfloat16; what is written to each matrix is what is read, whatever its neighbours are."""
    room = sum(r * (i + o) for slot in ranks for r, i, o in zip(slot, IN, OUT, strict=True)) + 10 * len(ranks)
    whole = torch.zeros(room + 3)
    tables = LoraTables.empty(whole[3:], in_features=IN, out_features=OUT, slots=len(ranks))
    offset, taken, expected = 0, 0, {}
    for slot, slot_ranks in enumerate(ranks):
        offset += -offset % alignment
        size = tables.place(slot, offset, slot_ranks, [1.0] * len(IN), is_bf16=slot % 2 == 0)
        values = sum(r * (i + o) for r, i, o in zip(slot_ranks, IN, OUT, strict=True))
        assert size == tables.numel(slot_ranks, is_bf16=slot % 2 == 0) == (-(-values // 2) if slot % 2 == 0 else values)
        offset, taken = offset + size, taken + size
        for row in range(len(IN)):
            for name in ("a", "bt"):
                matrix = getattr(tables, name)(row, slot)
                assert matrix.dtype == (torch.bfloat16 if slot % 2 == 0 else torch.float32)
                expected[name, row, slot] = value = 1 + len(expected) % 100
                matrix.fill_(value)
    for (name, row, slot), value in expected.items():
        assert (getattr(tables, name)(row, slot) == value).all()
    assert int((whole != 0).sum()) <= taken
    assert (whole[:3] == 0).all()


def test_bfloat16_slots_need_a_float32_arena_that_serves() -> None:
    for arena, grad in ((torch.zeros(100, dtype=torch.bfloat16), None), (torch.zeros(100), torch.zeros(100))):
        tables = LoraTables.empty(arena, in_features=(3,), out_features=(2,), slots=1, grad=grad)
        with pytest.raises(ValueError, match="need a float32 arena without gradients"):
            tables.place(0, 0, [2], [1.0], is_bf16=True)
        assert (tables.rank(0, 0), tables.is_bf16[0], tables.version) == (0, 0, 0)


def test_a_slot_becomes_wide_again() -> None:
    tables = LoraTables.empty(torch.zeros(100), in_features=(3,), out_features=(2,), slots=1)
    assert tables.place(0, 4, [3], [1.0], is_bf16=True) == 8
    assert (tables.a_offset[0, 0], tables.b_offset[0, 0], tables.is_bf16[0]) == (8, 17, 1)
    assert tables.place(0, 4, [3], [1.0]) == 15
    assert (tables.a_offset[0, 0], tables.b_offset[0, 0], tables.is_bf16[0]) == (4, 13, 0)
    tables.place(0, 4, [3], [1.0], is_bf16=True)
    tables.clear(0)
    assert tables.is_bf16[0] == 0


def test_every_change_raises_the_version() -> None:
    tables = LoraTables.empty(torch.zeros(100), in_features=(3,), out_features=(2,), slots=2)
    seen = [tables.version]
    tables.place(0, 0, [2], [1.0])
    seen.append(tables.version)
    with pytest.raises(ValueError, match="do not fit"):
        tables.place(0, 99, [2], [1.0])
    tables.clear(0)
    seen.append(tables.version)
    assert seen == [0, 1, 2]


@given(slot_lists)
def test_arrays_on_the_host_equal_the_segments(slots: list[int]) -> None:
    segments = build_segments(slots)
    assert segments.arrays.perm.tolist() == segments.perm.tolist()
    assert segments.arrays.seg_ptr.tolist() == list(segments.seg_ptr)
    assert segments.arrays.seg_slot.tolist() == list(segments.seg_slot)
    assert all(array.dtype == np.int64 and array.flags.c_contiguous for array in segments.arrays)
    assert segments.record.values[3] == len(segments.seg_slot)


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
        ({"ranks": torch.zeros(1, 4, dtype=torch.int32)[:, ::2]}, "ranks must be contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            LoraTables(**{**fields, **sizes, **change})


@pytest.mark.parametrize("slots", [[0, -2], [[0, 1]]])
def test_slots_that_mean_nothing_are_refused(slots: list[int]) -> None:
    with pytest.raises(ValueError, match="one-dimensional"):
        build_segments(slots)
