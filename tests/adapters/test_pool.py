"""The slot pool: true ranks, references, pins, room made by age, and a proof after every operation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenora.adapters.free_list import FreeList
from tenora.adapters.peft_format import AdapterWeights, LoraModule
from tenora.adapters.pool import SlotPool
from tenora.adapters.targets import TargetModule
from tenora.errors import AdapterFormatError, PoolFullError, UnavailableError

TARGETS = (
    TargetModule("model.layers.0.self_attn.q_proj", 0, 6, 4),
    TargetModule("model.layers.0.self_attn.k_proj", 1, 6, 2),
    TargetModule("model.layers.0.mlp.down_proj", 2, 10, 6),
)
ROW = 16  # float32 elements of the alignment


def adapter(ranks: Sequence[int], seed: int = 0, dtype: str = "float32") -> AdapterWeights:
    """Random weights with a rank per target; 0 leaves the module out."""
    random = np.random.default_rng(seed)

    def values(*shape: int) -> Any:
        array = random.normal(size=shape).astype(np.float32)
        if dtype == "bfloat16":
            return (array.view(np.uint32) >> 16).astype(np.uint16)
        return array.astype(dtype)

    modules = {
        target.path: LoraModule(
            path=target.path,
            rank=rank,
            scaling=0.5 + seed + target.row,
            a=values(rank, target.in_features),
            b=values(target.out_features, rank),
            dtype=dtype,
        )
        for target, rank in zip(TARGETS, ranks, strict=True)
        if rank
    }
    names = tuple(target.name for target in TARGETS if target.path in modules)
    nbytes = sum(module.a.nbytes + module.b.nbytes for module in modules.values())
    return AdapterWeights(modules, max(ranks), names, {}, nbytes)


def make_pool(elements: int = 1024, slots: int = 4, dtype: torch.dtype = torch.float32) -> SlotPool:
    return SlotPool(
        TARGETS, max_slots=slots, max_bytes=elements * dtype.itemsize, dtype=dtype, device=torch.device("cpu")
    )


def assert_holds(pool: SlotPool, slot: int, weights: AdapterWeights) -> None:
    """The slot has the adapter's ranks, scalings and values, and no others."""
    for target in TARGETS:
        module = weights.modules.get(target.path)
        if module is None:
            assert pool.tables.rank(target.row, slot) == 0
            continue
        assert pool.tables.rank(target.row, slot) == module.rank
        assert pool.tables.scale(target.row, slot) == pytest.approx(module.scaling)
        for got, array in ((pool.tables.a(target.row, slot), module.a), (pool.tables.bt(target.row, slot), module.bt)):
            wanted = torch.from_numpy(np.ascontiguousarray(array))
            wanted = wanted.view(torch.bfloat16) if module.dtype == "bfloat16" else wanted
            assert torch.equal(got, wanted.to(got.dtype))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_insert_holds_every_type(dtype: str, stored: torch.dtype) -> None:
    pool = make_pool(dtype=stored)
    for seed, ranks in enumerate([(1, 2, 3), (0, 4, 0), (5, 0, 1)]):
        weights = adapter(ranks, seed, dtype)
        assert_holds(pool, pool.insert(f"d{seed}", weights), weights)
        pool.check_integrity()
    assert pool.resident() == ("d0", "d1", "d2")


def test_true_ranks_take_true_room() -> None:
    pool = make_pool()
    pool.insert("a", adapter((3, 0, 0)))
    assert pool.used_bytes == 4 * (-(-3 * 10 // ROW) * ROW)


def test_references_and_age() -> None:
    pool = make_pool(slots=2)
    a = pool.insert("a", adapter((1, 1, 1)))
    b = pool.insert("b", adapter((1, 1, 1), 1))
    assert (pool.acquire("a"), pool.acquire("missing")) == (a, None)
    assert pool.resident() == ("b", "a")
    assert pool.insert("c", adapter((1, 1, 1), 2)) == b, "b is the only one without a reference"
    assert pool.acquire("c") == b
    with pytest.raises(PoolFullError, match="in use or pinned") as caught:
        pool.insert("d", adapter((1, 1, 1), 3))
    assert isinstance(caught.value, UnavailableError)
    assert caught.value.code == "adapter_unavailable"
    assert pool.resident() == ("a", "c")
    pool.release("a")
    assert pool.insert("d", adapter((1, 1, 1), 3)) == a
    assert pool.evictions == 2
    pool.check_integrity()


def test_a_slot_in_use_keeps_its_values_while_others_come_and_go() -> None:
    pool = make_pool(elements=160, slots=3)
    kept = adapter((1, 0, 1), 7)
    slot = pool.insert("kept", kept)
    assert pool.acquire("kept") == slot
    for seed in range(20):
        pool.insert(f"d{seed}", adapter((1 + seed % 3, seed % 2, 0), seed))
        pool.check_integrity()
        assert_holds(pool, slot, kept)
    assert pool.evictions > 10


def test_inserting_twice_changes_nothing() -> None:
    pool = make_pool()
    weights = adapter((1, 2, 3))
    slot = pool.insert("a", weights)
    assert pool.insert("a", adapter((3, 2, 1), 9)) == slot
    assert_holds(pool, slot, weights)


def test_pins() -> None:
    pool = make_pool(slots=1)
    pool.insert("a", adapter((1, 1, 1)))
    pool.pin("a")
    with pytest.raises(PoolFullError):
        pool.insert("b", adapter((1, 1, 1)))
    pool.unpin("a")
    pool.unpin("never there")
    pool.insert("b", adapter((1, 1, 1)))
    assert pool.resident() == ("b",)
    with pytest.raises(ValueError, match="is not resident"):
        pool.pin("a")


def test_evict() -> None:
    pool = make_pool()
    pool.insert("a", adapter((1, 1, 1)))
    pool.pin("a")
    assert not pool.evict("missing")
    assert pool.evict("a")
    slot = pool.insert("b", adapter((1, 1, 1), 1))
    assert pool.acquire("b") == slot
    assert not pool.evict("b"), "it is in use"
    assert pool.acquire("b") == slot
    pool.release("b")
    assert pool.resident() == ("b",)
    pool.release("b")
    assert pool.resident() == ()
    assert pool.evictions == 2
    pool.check_integrity()


def test_releases_that_nobody_owes() -> None:
    pool = make_pool()
    pool.insert("a", adapter((1, 1, 1)))
    for digest in ("a", "b"):
        with pytest.raises(ValueError, match="no reference"):
            pool.release(digest)


def test_larger_than_the_pool() -> None:
    pool = make_pool(elements=64)
    pool.insert("a", adapter((1, 0, 0)))
    with pytest.raises(AdapterFormatError, match="the whole pool has 256"):
        pool.insert("b", adapter((0, 0, 5)))
    assert pool.resident() == ("a",), "nothing is evicted for what cannot fit"


def test_nothing_is_evicted_in_vain() -> None:
    pool = make_pool(elements=5 * ROW, slots=8)
    pool.insert("used", adapter((3, 0, 0)))  # two rows of the alignment
    pool.acquire("used")
    pool.insert("idle", adapter((3, 0, 0), 1))
    with pytest.raises(PoolFullError):
        pool.insert("big", adapter((0, 0, 4), 2))  # four: more than the idle one's two and the free one
    assert pool.resident() == ("used", "idle")


def test_room_in_pieces_is_joined() -> None:
    pool = make_pool(elements=6 * ROW, slots=8)
    weights = {name: adapter((1, 0, 0), seed) for seed, name in enumerate("abcdef")}  # one row of the alignment each
    slots = {name: pool.insert(name, weights[name]) for name in weights}
    for name in "bdf":
        assert pool.acquire(name) == slots[name]
    big = adapter((0, 0, 3), 9)  # three rows
    slot = pool.insert("big", big)
    assert pool.resident() == ("b", "d", "f", "big")
    pool.check_integrity()
    assert pool._free.holes == ()
    assert_holds(pool, slot, big)
    for name in "bdf":
        assert pool.acquire(name) == slots[name], "a slot in use keeps its number"
        assert_holds(pool, slots[name], weights[name])


def test_values_that_the_device_type_cannot_hold() -> None:
    pool = make_pool(dtype=torch.float16)
    weights = adapter((1, 1, 1))
    weights.modules[TARGETS[0].path].a[0, 0] = 1e30
    with pytest.raises(AdapterFormatError, match="beyond float16"):
        pool.insert("a", weights)
    assert pool.resident() == ()
    pool.check_integrity()


def test_adapters_of_another_base_are_not_half_applied() -> None:
    pool = make_pool()
    weights = adapter((1, 1, 1))
    module = weights.modules[TARGETS[0].path]
    foreign = AdapterWeights({**weights.modules, "model.layers.1.self_attn.q_proj": module}, 1, (), {}, 0)
    with pytest.raises(AdapterFormatError, match="another base"):
        pool.insert("a", foreign)


def test_rows_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="order of their rows"):
        SlotPool(TARGETS[1:], max_slots=1, max_bytes=64, dtype=torch.float32, device=torch.device("cpu"))


def test_a_large_pool_costs_nothing_to_start() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = make_pool(elements=2**29, slots=4096)  # two GiB of addresses, none of them touched
    assert pool.used_bytes == 0
    assert process.memory_info().rss - before < 2**27


@pytest.mark.parametrize("field", ["ranks", "a_offset", "b_offset"])
def test_the_proof_notices_tables_that_changed(field: str) -> None:
    pool = make_pool()
    slot = pool.insert("a", adapter((2, 2, 2)))
    pool.check_integrity()
    getattr(pool.tables, field)[1, slot] += 1
    with pytest.raises(RuntimeError, match="adapter a"):
        pool.check_integrity()


def test_the_proof_notices_lost_room_and_slots() -> None:
    pool = make_pool()
    pool.insert("a", adapter((2, 2, 2)))
    pool._free.allocate(16)
    with pytest.raises(RuntimeError, match="the range before it ends"):
        pool.check_integrity()
    pool = make_pool()
    pool._free_slots.pop()
    with pytest.raises(RuntimeError, match="each slot once"):
        pool.check_integrity()
    pool = make_pool()
    pool.tables.ranks[0, 2] = 1
    with pytest.raises(RuntimeError, match="slot 2 is free"):
        pool.check_integrity()


class PoolMachine(RuleBasedStateMachine):
    """Random operations against a model of what must be resident, referenced and pinned."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = make_pool(elements=20 * ROW, slots=3)
        self.references: dict[str, int] = {}
        self.pinned: set[str] = set()
        self.doomed: set[str] = set()
        self.weights: dict[str, AdapterWeights] = {}

    digests = st.sampled_from([f"d{i}" for i in range(6)])

    def forget_the_gone(self) -> None:
        gone = set(self.references) - set(self.pool.resident())
        for digest in gone:
            assert self.references.pop(digest) == 0
            assert digest not in self.pinned
            self.doomed.discard(digest)

    @rule(digest=digests, ranks=st.tuples(*[st.integers(0, 6)] * 3).filter(any))
    def insert(self, digest: str, ranks: tuple[int, int, int]) -> None:
        weights = adapter(ranks, seed=len(self.weights))
        before = self.pool.resident()
        try:
            self.pool.insert(digest, weights)
        except (PoolFullError, AdapterFormatError):
            assert self.pool.resident() == before
            return
        self.forget_the_gone()
        if digest not in before:
            self.weights[digest], self.references[digest] = weights, 0

    @rule(digest=digests)
    def acquire(self, digest: str) -> None:
        slot = self.pool.acquire(digest)
        assert (slot is not None) == (digest in self.references)
        if slot is not None:
            self.references[digest] += 1

    @precondition(lambda self: any(self.references.values()))
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from([d for d, count in self.references.items() if count]))
        self.pool.release(digest)
        self.references[digest] -= 1
        if digest in self.doomed and not self.references[digest]:
            assert digest not in self.pool.resident()
        self.forget_the_gone()

    @rule(digest=digests)
    def evict(self, digest: str) -> None:
        idle = self.references.get(digest) == 0
        if digest in self.references and not idle:
            self.doomed.add(digest)
        self.pinned.discard(digest)
        assert self.pool.evict(digest) == idle
        self.forget_the_gone()

    @rule(digest=digests)
    def pin(self, digest: str) -> None:
        if digest in self.references:
            self.pool.pin(digest)
            self.pinned.add(digest)
            self.doomed.discard(digest)

    @rule(digest=digests)
    def unpin(self, digest: str) -> None:
        self.pool.unpin(digest)
        self.pinned.discard(digest)

    @invariant()
    def all_is_well(self) -> None:
        self.pool.check_integrity()
        assert set(self.pool.resident()) == set(self.references)
        for digest, resident in self.pool._residents.items():
            assert_holds(self.pool, resident.slot, self.weights[digest])


PoolMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


def test_free_list() -> None:
    free = FreeList(100, alignment=8)
    assert (free.capacity, free.free, free.holes) == (96, 96, ((0, 96),))
    first, second, third = free.allocate(9), free.allocate(8), free.allocate(1)
    assert (first, second, third, free.holes) == (0, 16, 24, ((32, 96),))
    free.release(16, 8)
    assert free.holes == ((16, 24), (32, 96))
    assert free.allocate(65) is None
    for start, size in ((16, 8), (8, 16), (32, 8), (-8, 8), (88, 16), (24, 16)):
        with pytest.raises(ValueError, match="is not an allocated range"):
            free.release(start, size)
    free.release(24, 1)
    assert free.holes == ((16, 96),)
    free.release(0, 9)
    assert free.holes == ((0, 96),)
    assert FreeList(7, alignment=8).allocate(1) is None
