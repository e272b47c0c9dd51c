"""The slot pool: true ranks, references, pins, room made by age, and a proof after every operation."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import psutil
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenora.adapters import pool as pool_module
from tenora.adapters.pool import SlotPool
from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.table_rows import TableRows
from tenora.adapters.weights import AdapterWeights
from tenora.errors import AdapterFormatError, PoolFullError, UnavailableError
from tests.adapters.weights import ROWS, TARGETS, adapter, prepared

ROW = 16  # float32 elements of the alignment


def make_pool(elements: int = 1024, slots: int = 4, dtype: torch.dtype = torch.float32) -> SlotPool:
    return SlotPool(ROWS, max_slots=slots, max_bytes=elements * dtype.itemsize, dtype=dtype, device=torch.device("cpu"))


def put(pool: SlotPool, digest: str, weights: AdapterWeights) -> int:
    return pool.insert(digest, prepared(weights, pool.tables.arena.dtype))


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
        assert_holds(pool, put(pool, f"d{seed}", weights), weights)
        pool.check_integrity()
    assert pool.resident() == ("d0", "d1", "d2")


def test_true_ranks_take_true_room() -> None:
    pool = make_pool()
    put(pool, "a", adapter((3, 0, 0)))
    assert pool.used_bytes == 4 * (-(-3 * 10 // ROW) * ROW)


def test_references_and_age() -> None:
    pool = make_pool(slots=2)
    a = put(pool, "a", adapter((1, 1, 1)))
    b = put(pool, "b", adapter((1, 1, 1), 1))
    assert (pool.acquire("a"), pool.acquire("missing")) == (a, None)
    assert pool.resident() == ("b", "a")
    assert put(pool, "c", adapter((1, 1, 1), 2)) == b, "b is the only one without a reference"
    assert pool.acquire("c") == b
    with pytest.raises(PoolFullError, match="in use or pinned") as caught:
        put(pool, "d", adapter((1, 1, 1), 3))
    assert isinstance(caught.value, UnavailableError)
    assert caught.value.code == "adapter_unavailable"
    assert pool.resident() == ("a", "c")
    pool.release("a")
    assert put(pool, "d", adapter((1, 1, 1), 3)) == a
    assert pool.evictions == 2
    pool.check_integrity()


def test_a_slot_in_use_keeps_its_values_while_others_come_and_go() -> None:
    pool = make_pool(elements=160, slots=3)
    kept = adapter((1, 0, 1), 7)
    slot = put(pool, "kept", kept)
    assert pool.acquire("kept") == slot
    for seed in range(20):
        put(pool, f"d{seed}", adapter((1 + seed % 3, seed % 2, 0), seed))
        pool.check_integrity()
        assert_holds(pool, slot, kept)
    assert pool.evictions > 10


def test_inserting_twice_changes_nothing() -> None:
    pool = make_pool()
    weights = adapter((1, 2, 3))
    slot = put(pool, "a", weights)
    assert put(pool, "a", adapter((3, 2, 1), 9)) == slot
    assert_holds(pool, slot, weights)


def test_pins() -> None:
    pool = make_pool(slots=1)
    put(pool, "a", adapter((1, 1, 1)))
    pool.pin("a")
    with pytest.raises(PoolFullError):
        put(pool, "b", adapter((1, 1, 1)))
    pool.unpin("a")
    pool.unpin("never there")
    put(pool, "b", adapter((1, 1, 1)))
    assert pool.resident() == ("b",)
    with pytest.raises(ValueError, match="is not resident"):
        pool.pin("a")


def test_evict() -> None:
    pool = make_pool()
    put(pool, "a", adapter((1, 1, 1)))
    pool.pin("a")
    assert not pool.evict("missing")
    assert pool.evict("a")
    slot = put(pool, "b", adapter((1, 1, 1), 1))
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
    put(pool, "a", adapter((1, 1, 1)))
    for digest in ("a", "b"):
        with pytest.raises(ValueError, match="no reference"):
            pool.release(digest)


def test_larger_than_the_pool() -> None:
    pool = make_pool(elements=64)
    put(pool, "a", adapter((1, 0, 0)))
    with pytest.raises(AdapterFormatError, match="all of the pool has 256"):
        put(pool, "b", adapter((0, 0, 5)))
    assert pool.resident() == ("a",), "nothing is evicted for what cannot fit"


def test_nothing_is_evicted_in_vain() -> None:
    pool = make_pool(elements=5 * ROW, slots=8)
    put(pool, "used", adapter((3, 0, 0)))  # two rows of the alignment
    pool.acquire("used")
    put(pool, "idle", adapter((3, 0, 0), 1))
    with pytest.raises(PoolFullError):
        put(pool, "big", adapter((0, 0, 4), 2))  # four: more than the idle one's two and the free one
    assert pool.resident() == ("used", "idle")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_room_in_pieces_is_joined(dtype: str) -> None:
    pool = make_pool(elements=6 * ROW, slots=8)
    weights = {n: adapter((1, 0, 0), seed, dtype) for seed, n in enumerate("abcdef")}  # one row of the alignment each
    slots = {name: put(pool, name, weights[name]) for name in weights}
    for name in "bdf":
        assert pool.acquire(name) == slots[name]
    big = adapter((0, 0, 3), 9)  # three rows
    slot = put(pool, "big", big)
    assert pool.resident() == ("b", "d", "f", "big")
    pool.check_integrity()
    assert pool._free.holes == ()
    assert_holds(pool, slot, big)
    for name in "bdf":
        assert pool.acquire(name) == slots[name], "a slot in use keeps its number"
        assert_holds(pool, slots[name], weights[name])


def test_bfloat16_stays_bfloat16_in_an_arena_of_float32() -> None:
    pool = make_pool()
    narrow, wide = adapter((3, 0, 1), 1, "bfloat16"), adapter((3, 0, 1), 2)
    slots = [put(pool, "narrow", narrow), put(pool, "wide", wide)]
    assert pool.tables.is_bf16[slots].tolist() == [1, 0]
    assert pool.tables.a(0, slots[0]).dtype == torch.bfloat16
    assert pool.tables.a(0, slots[1]).dtype == torch.float32
    elements = 3 * 10 + 16
    assert pool.used_bytes == 4 * (-(-elements // 2 // ROW) * ROW + -(-elements // ROW) * ROW)
    assert_holds(pool, slots[0], narrow)
    assert_holds(pool, slots[1], wide)
    assert pool.evict("narrow")
    assert_holds(pool, put(pool, "again", wide), wide)
    pool.check_integrity()


def test_adapters_prepared_for_something_else_are_refused() -> None:
    pool = make_pool(dtype=torch.bfloat16)
    good = prepared(adapter((1, 1, 1)), torch.bfloat16)
    for wrong in (
        prepared(adapter((1, 1, 1)), torch.float32),
        PreparedAdapter(good.values, good.ranks[:2], good.scaling[:2]),
        PreparedAdapter(good.values[:-1], good.ranks, good.scaling),
    ):
        with pytest.raises(ValueError, match="not prepared for this pool"):
            pool.insert("a", wrong)
    assert pool.resident() == ()
    pool.check_integrity()


def test_equal_sizes_are_never_moved() -> None:
    pool = make_pool(elements=7 * ROW, slots=8)
    for step in range(60):
        put(pool, f"d{step}", adapter((1, 0, 0), step))
        if step % 3 == 0:
            assert pool.acquire(f"d{step}") is not None
        if step >= 9 and step % 3 == 0:
            pool.release(f"d{step - 9}")
    assert pool.evictions > 50
    assert pool.moved_bytes == 0


def test_little_is_moved_and_the_rest_is_evicted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the room is in pieces, the window that takes the fewest moves is closed up, or more adapters go."""

    def fragmented(slots: int) -> SlotPool:
        pool = make_pool(elements=12 * ROW, slots=slots)
        for seed, (name, rows) in enumerate({"A": 1, "B": 4, "c": 1, "D": 1, "e": 1, "F": 4}.items()):
            put(pool, name, adapter((rows, 0, 0) if rows == 1 else (6, 0, 0), seed))
            if name.isupper():
                assert pool.acquire(name) is not None
        return pool

    pool = fragmented(8)
    before = {name: pool._residents[name].offset for name in "BDF"}
    big = adapter((0, 4, 0), 9)  # two rows: the holes of c and e with D between them
    assert_holds(pool, put(pool, "big", big), big)
    assert pool.moved_bytes == 4 * ROW
    assert pool._residents["D"].offset == before["D"] - ROW
    assert (pool._residents["B"].offset, pool._residents["F"].offset) == (before["B"], before["F"])
    pool.check_integrity()
    monkeypatch.setattr(pool_module, "_MAX_MOVED_BYTES", 0)
    pool = fragmented(8)
    pool.release("D")
    put(pool, "big", big)
    assert pool.moved_bytes == 0
    assert "D" not in pool.resident()
    pool.check_integrity()
    pool = fragmented(8)  # nothing can go: moving is better than failing
    put(pool, "big", big)
    assert pool.moved_bytes > 0
    pool.check_integrity()


def test_rows_must_be_in_order() -> None:
    with pytest.raises(ValueError, match="order of their rows"):
        TableRows(TARGETS[1:])


def test_a_large_pool_costs_nothing_to_start() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    pool = make_pool(elements=2**29, slots=4096)  # two GiB of addresses, none of them touched
    assert pool.used_bytes == 0
    assert process.memory_info().rss - before < 2**27


def test_thousands_of_slots_cost_nothing_to_start() -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    targets = tuple(replace(TARGETS[0], path=f"model.layers.{row}.self_attn.q_proj", row=row) for row in range(500))
    pool = SlotPool(
        TableRows(targets), max_slots=20_000, max_bytes=2**20, dtype=torch.float32, device=torch.device("cpu")
    )
    assert pool.tables.slots == 20_000  # tables of 240 MB
    assert process.memory_info().rss - before < 2**25


@pytest.mark.parametrize("field", ["ranks", "a_offset", "b_offset"])
def test_the_proof_notices_tables_that_changed(field: str) -> None:
    pool = make_pool()
    slot = put(pool, "a", adapter((2, 2, 2)))
    pool.check_integrity()
    getattr(pool.tables, field)[1, slot] += 1
    with pytest.raises(RuntimeError, match="adapter a"):
        pool.check_integrity()


def test_the_proof_notices_a_slot_of_the_wrong_type() -> None:
    pool = make_pool()
    slot = put(pool, "a", adapter((2, 2, 2), dtype="bfloat16"))
    pool.check_integrity()
    pool.tables.is_bf16[slot] = 0
    with pytest.raises(RuntimeError, match="differ about the type"):
        pool.check_integrity()


def test_the_proof_notices_lost_room_and_slots() -> None:
    pool = make_pool()
    put(pool, "a", adapter((2, 2, 2)))
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
        self.pending_eviction: set[str] = set()
        self.weights: dict[str, AdapterWeights] = {}

    digests = st.sampled_from([f"d{i}" for i in range(6)])

    def forget_the_gone(self) -> None:
        gone = set(self.references) - set(self.pool.resident())
        for digest in gone:
            assert self.references.pop(digest) == 0
            assert digest not in self.pinned
            self.pending_eviction.discard(digest)

    @rule(
        digest=digests,
        ranks=st.tuples(*[st.integers(0, 6)] * 3).filter(any),
        dtype=st.sampled_from(["float32", "float16", "bfloat16"]),
    )
    def insert(self, digest: str, ranks: tuple[int, int, int], dtype: str) -> None:
        weights = adapter(ranks, seed=len(self.weights), dtype=dtype)
        before = self.pool.resident()
        try:
            put(self.pool, digest, weights)
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
        if digest in self.pending_eviction and not self.references[digest]:
            assert digest not in self.pool.resident()
        self.forget_the_gone()

    @rule(digest=digests)
    def evict(self, digest: str) -> None:
        idle = self.references.get(digest) == 0
        if digest in self.references and not idle:
            self.pending_eviction.add(digest)
        self.pinned.discard(digest)
        assert self.pool.evict(digest) == idle
        self.forget_the_gone()

    @rule(digest=digests)
    def pin(self, digest: str) -> None:
        if digest in self.references:
            self.pool.pin(digest)
            self.pinned.add(digest)
            self.pending_eviction.discard(digest)

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
