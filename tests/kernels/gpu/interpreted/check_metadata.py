"""Device metadata against the host's grouping, and what an engine prepares once, in Triton's interpreter."""

from __future__ import annotations

import random
from itertools import accumulate, groupby, pairwise

import pytest
import torch

from tenora_kernels.gpu import backend
from tenora_kernels.gpu.context import GpuLora
from tenora_kernels.gpu.tables import DeviceTables, StepMetadata
from tenora_kernels.layout import LoraTables
from tests.kernels.cases import QKV, make_case, make_tables, worst
from tests.kernels.gpu.cases import INTERPRETED, MIXED, reference
from tests.support.full import full_but

CPU = torch.device("cpu")


def check(metadata: StepMetadata, slots: list[int]) -> None:
    """The device groups `slots` as the host does rows that lie apart, by slot, and its tiles cut it as they promise."""
    in_order = sorted((t for t, slot in enumerate(slots) if slot >= 0), key=slots.__getitem__)
    n, members = len(in_order), [(slot, len(list(own))) for slot, own in groupby(slots[t] for t in in_order)]
    seg_ptr = [*accumulate((size for _, size in members), initial=0)]
    count = int(metadata.nseg) if slots else 0
    perm = metadata.perm[: len(slots)].tolist()
    assert perm[:n] == in_order
    assert perm[n:] == [t for t, slot in enumerate(slots) if slot < 0]
    assert count == len(members)
    assert metadata.seg_slot[:count].tolist() == [slot for slot, _ in members]
    assert metadata.seg_ptr[: metadata.segments + 1].tolist() == [
        *seg_ptr[:-1],
        *[n] * (metadata.segments + 1 - count),
    ]
    ordered = [slots[t] for t in perm]
    for table, rows in ((metadata.small, n), (metadata.large, len(slots))):
        bound = metadata.tile_bound(table)
        ptr, owner = table.ptr[: bound + 1].tolist(), table.slot[:bound].tolist()
        assert ptr[0] == 0
        assert ptr[-1] == rows, "the tiles do not reach the end"
        there = sum(stop > start for start, stop in pairwise(ptr))
        assert owner[there:] == [-1] * (bound - there), "a tile that is not there has a slot"
        assert table is metadata.large or not slots or int(metadata.small_count) == there
        for i in range(bound):
            assert 0 <= ptr[i + 1] - ptr[i] <= table.size
            assert all(slot == owner[i] for slot in ordered[ptr[i] : ptr[i + 1]])


@pytest.mark.parametrize("rows", full_but([7, 65], [1, 7, 64, 65, 300]))
@pytest.mark.parametrize("kind", ["mixed", "one", "base", "distinct"])
def test_equals_the_grouping_on_the_host(rows: int, kind: str) -> None:
    generator = random.Random(rows)
    choices = {
        "mixed": [generator.randrange(-1, 9) for _ in range(rows)],
        "one": [3] * rows,
        "base": [-1] * rows,
        "distinct": generator.sample(range(400), rows),
    }
    metadata = StepMetadata(300, 400, CPU)
    metadata.build(torch.tensor(choices[kind]))
    check(metadata, choices[kind])


def test_buffers_serve_any_later_step() -> None:
    """What a graph relies on: the same buffers, with more segments, fewer, none."""
    metadata = StepMetadata(48, 30, CPU)
    for slots in ([2] * 40, list(range(30)) + [-1] * 10, [-1] * 40, [5, -1] * 20, [29 - t % 30 for t in range(40)]):
        metadata.build(torch.tensor(slots, dtype=torch.int32))
        check(metadata, slots)
    with pytest.raises(ValueError, match="do not fit metadata for 48 rows"):
        metadata.build(torch.zeros(49, dtype=torch.int32))


def test_a_bound_of_the_caller_narrows_the_grid() -> None:
    metadata = StepMetadata(64, 1000, CPU)
    metadata.build(torch.tensor([4, 7] * 32))
    loose = metadata.tile_bound(metadata.small)
    metadata.build(torch.tensor([4, 7] * 32), max_segments=2)
    assert metadata.tile_bound(metadata.small) < loose
    check(metadata, [4, 7] * 32)


def test_mirrors_follow_the_version() -> None:
    tables = make_tables(MIXED, torch.float32)
    mirror = DeviceTables(tables)
    assert not mirror.refresh(tables)
    assert (mirror.max_rank, mirror.align) == (64, 1), "the model has a width of 72"
    tables.place(2, 37, [65, 0, 0, 0, 0, 0, 0], [0.5] * 7)
    assert mirror.refresh(tables)
    assert (mirror.max_rank, mirror.align) == (65, 1)
    for name in ("ranks", "scaling", "a_offset", "b_offset"):
        assert torch.equal(getattr(mirror, name), getattr(tables, name))
    tables.clear(2)
    assert mirror.refresh(tables)
    assert not mirror.ranks[:, 2].any()


def test_a_broken_promise_is_refused_and_leaves_the_mirror() -> None:
    tables = LoraTables.empty(torch.zeros(4000), in_features=(16,), out_features=(32,), slots=2)
    mirror = DeviceTables(tables, max_rank=8, align=16)
    tables.place(0, 0, [9], [1.0])
    with pytest.raises(ValueError, match="has rank 9; these kernels were prepared for 8"):
        mirror.refresh(tables)
    tables.place(0, 3, [8], [1.0])
    with pytest.raises(ValueError, match="does not lie at a multiple of 16"):
        mirror.refresh(tables)
    assert not mirror.ranks.any()
    tables.place(0, 0, [4], [1.0], is_bf16=True)
    with pytest.raises(ValueError, match="are for the CPU"):
        mirror.refresh(tables)
    tables.place(0, 16, [8], [1.0])
    assert mirror.refresh(tables)
    assert DeviceTables(tables).align == 16


def test_an_engine_prepares_once_and_refreshes() -> None:
    slots = [4, -1, 0, 5, 2, 4, -1, 5]
    case = make_case(slots, MIXED)
    prepared = GpuLora(case.tables, max_rows=16, max_rank=64)
    for order in (slots, [1] * 8, [-1] * 8, [0, 1, 2, 3, 4, 5, 0, -1]):
        case.slots = order
        batch = prepared.batch(torch.tensor(order))
        y = case.y.clone()
        backend.forward(y, case.x, QKV, batch)
        assert worst(y, reference(case)) <= INTERPRETED[torch.float32]
    case.tables.clear(5)
    assert prepared.refresh()
    assert not prepared.refresh()
    y = case.y.clone()
    backend.forward(y, case.x, QKV, prepared.batch(torch.tensor(order)))
    assert torch.equal(y[5], case.y[5])
    with pytest.raises(TypeError, match="no GPU kernel for"):
        backend.forward(y.double(), case.x.double(), QKV, batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_have_the_same_bits_for_every_bound_of_the_ranks(dtype: torch.dtype) -> None:
    """So that a neighbour of high rank, for whom other kernels run, changes nobody's numbers."""
    case = make_case([3, -1, 0, 3, 1, 2], [[r] * 7 for r in (1, 4, 8, 16, 33)], dtype=dtype)
    slots = torch.tensor(case.slots)
    found = []
    for pool, bound in ((16, None), (256, 16), (256, None)):
        if pool == 16:
            case.tables.clear(4)
        lora = GpuLora(case.tables, max_rows=6, max_rank=pool, align=1)
        y = case.y.clone()
        backend.forward(y, case.x, QKV, lora.batch(slots, max_rank=bound))
        found.append(y)
    assert worst(found[0], reference(case)) <= INTERPRETED[dtype]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])
