"""Adapters on their way to a slot, with reads that end when the test says so."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, wait
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tenora.adapters.host_cache import HostCache
from tenora.adapters.pool import SlotPool
from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.ref import AdapterRef
from tenora.engine.loader import MAX_READS, AdapterLoader
from tenora.engine.scheduler import Blocked
from tenora.errors import UnavailableError
from tests.adapters.weights import ROWS, adapter, prepared
from tests.engine.requests import ref
from tests.support.patience import PATIENCE

BYTES = 64  # of the smallest adapter in the arena


class Disk:
    """Adapters of ranks (n, 0, 0). Reads wait at the gate; they are listed as they begin."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.begun: list[str] = []
        self.broken: set[str] = set()
        self.ranks: dict[str, tuple[int, int, int]] = {}

    def read(self, wanted: AdapterRef) -> PreparedAdapter:
        self.begun.append(wanted.digest)
        assert self.gate.wait(PATIENCE)
        if wanted.digest in self.broken:
            raise OSError(5, "Input/output error")
        return prepared(adapter(self.ranks.get(wanted.digest, (1, 0, 0)), sum(wanted.digest.encode())))


Make = Callable[..., tuple[AdapterLoader, Disk]]


@pytest.fixture
def make() -> Iterator[Make]:
    made: list[tuple[AdapterLoader, Disk]] = []

    def make(slots: int = 4, cache_bytes: int = 2**20, elements: int = 1024) -> tuple[AdapterLoader, Disk]:
        disk = Disk()
        loader = AdapterLoader(make_pool(slots, elements), disk.read, HostCache(cache_bytes))
        made.append((loader, disk))
        return made[-1]

    yield make
    for loader, disk in made:
        disk.gate.set()
        loader.close()


def make_pool(slots: int, elements: int = 1024) -> SlotPool:
    return SlotPool(ROWS, max_slots=slots, max_bytes=4 * elements, dtype=torch.float32, device=torch.device("cpu"))


def settle(loader: AdapterLoader) -> None:
    wait(loader._reads.values(), timeout=PATIENCE)


def refs(*digests: str) -> list[AdapterRef]:
    return [ref(digest) for digest in digests]


def test_a_miss_loads_in_the_background_and_then_costs_a_copy(make: Make) -> None:
    loader, disk = make()
    disk.gate.clear()
    assert loader.acquire(ref("a")) is Blocked.LOADING
    assert loader.acquire(ref("a")) is Blocked.LOADING
    assert not loader.idle
    disk.gate.set()
    settle(loader)
    slot = loader.acquire(ref("a"))
    assert slot == loader.acquire(ref("a"))
    assert (disk.begun, loader.loads, loader.failures) == (["a"], 1, 0)
    assert loader.load_seconds > 0
    loader.check_integrity()


def test_what_had_to_leave_its_slot_comes_back_without_the_disk(make: Make) -> None:
    loader, disk = make(slots=1)
    for digest in "abab":
        while isinstance(loader.acquire(ref(digest)), Blocked):
            settle(loader)
        loader.release(digest)
    assert disk.begun == ["a", "b"]
    assert (loader.loads, loader.pool.evictions) == (4, 3)


def test_a_cache_smaller_than_the_pool_keeps_no_second_copy(make: Make) -> None:
    loader, disk = make(slots=1, cache_bytes=4096)
    for digest in "aba":
        while isinstance(loader.acquire(ref(digest)), Blocked):
            settle(loader)
        assert loader.cache.used_bytes == 0
        loader.release(digest)
    assert disk.begun == ["a", "b", "a"]
    loader.check_integrity()


def test_reads_ahead_in_order_and_few_at_a_time(make: Make) -> None:
    loader, disk = make()
    disk.gate.clear()
    loader.read_ahead(refs(*"abcdefgh"))
    assert len(loader._reads) == MAX_READS
    disk.gate.set()
    settle(loader)
    loader.read_ahead(refs(*"abcdefgh"))
    settle(loader)
    loader.read_ahead([])
    assert disk.begun == list("abcdefgh")
    assert set(loader.cache.digests()) == set("abcdefgh")
    assert loader.cache.digests()[-1] == "e", "of those collected last, the one needed first stays longest"


def test_the_cache_lets_go_of_what_is_needed_last(make: Make) -> None:
    loader, _ = make(cache_bytes=3 * 40)  # three adapters of ten elements
    loader.cache.put("old", prepared(adapter((1, 0, 0))))
    for _ in range(4):
        loader.read_ahead(refs(*"abcdef"))
        settle(loader)
    loader.read_ahead(refs(*"abcdef"))
    assert "a" in loader.cache
    assert "old" not in loader.cache
    assert loader.cache.used_bytes <= 3 * 40
    loader.check_integrity()


def test_nothing_is_read_twice_while_everybody_waits_for_a_slot(make: Make) -> None:
    """A budget for one adapter, four that wait: without a bound they would push each other out for ever."""
    loader, disk = make(slots=1, cache_bytes=0)
    assert loader.acquire(ref("busy")) is Blocked.LOADING
    settle(loader)
    assert loader.acquire(ref("busy")) == 0
    for _ in range(20):
        loader.read_ahead(refs(*"abcd"))
        for digest in "abcd":
            assert isinstance(loader.acquire(ref(digest)), Blocked)
        settle(loader)
    assert disk.begun == ["busy", "a"]
    loader.release("busy")
    loader.read_ahead(refs(*"abcd"))
    assert loader.acquire(ref("a")) == 0


def test_a_broken_one_fails_once_it_is_asked_for_and_can_be_tried_again(make: Make) -> None:
    loader, disk = make()
    disk.broken = {"a"}
    loader.read_ahead(refs("a", "b"))
    settle(loader)
    loader.read_ahead(refs("a", "b"))
    assert disk.begun == ["a", "b"], "an error is kept for who waits, not repeated"
    with pytest.raises(UnavailableError, match="cannot be read \\(Input/output error\\)"):
        loader.acquire(ref("a"))
    assert loader.acquire(ref("b")) == 0
    assert loader.failures == 1
    disk.broken = set()
    assert loader.acquire(ref("a")) is Blocked.LOADING
    settle(loader)
    assert loader.acquire(ref("a")) == 1


def test_errors_that_nobody_waits_for_are_forgotten(make: Make) -> None:
    loader, disk = make()
    disk.broken = {"a", "b"}
    loader.read_ahead(refs("a", "b"))
    settle(loader)
    loader.read_ahead([])
    loader.drop_unwanted({"b"})
    disk.broken = set()
    assert loader.acquire(ref("a")) is Blocked.LOADING
    with pytest.raises(UnavailableError):
        loader.acquire(ref("b"))


def test_a_deleted_adapter_leaves_no_copy(make: Make) -> None:
    loader, disk = make()
    loader.read_ahead(refs("a", "b"))
    settle(loader)
    assert loader.acquire(ref("a")) == 0
    loader.release("a")
    disk.gate.clear()
    loader.read_ahead(refs("c"))
    for digest in "abc":
        loader.forget(digest)
    disk.gate.set()
    loader.read_ahead([])
    assert (len(loader.cache), loader.pool.resident(), loader._reads) == (0, (), {})
    loader.check_integrity()


class Queue(Executor):
    """Runs what was submitted when the test says so, on the test's own thread: a machine must not depend on timing."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        assert not kwargs
        future: Future[Any] = Future()
        self._waiting.append((future, fn, args))
        return future

    def run(self) -> None:
        waiting, self._waiting = self._waiting, []
        for future, function, args in waiting:
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(function(*args))
            except OSError as error:
                future.set_exception(error)


class LoaderMachine(RuleBasedStateMachine):
    """Requests, releases, pins, deletions and broken files; slots, arena and host copies must add up."""

    def __init__(self) -> None:
        super().__init__()
        self.disk = Disk()
        self.disk.ranks = {"0": (1, 0, 0), "1": (6, 1, 0), "2": (2, 2, 1), "3": (0, 0, 4), "4": (1, 1, 1)}
        self.loader = AdapterLoader(make_pool(3, 160), self.disk.read, HostCache(400))
        self.loader._executor.shutdown()
        self.reads = Queue()
        self.loader._executor = self.reads  # type: ignore[assignment]  # any executor will do
        self.held: list[str] = []

    digests = st.sampled_from("01234")

    @rule(digest=digests)
    def acquire(self, digest: str) -> None:
        try:
            slot = self.loader.acquire(ref(digest))
        except UnavailableError:
            assert digest in self.disk.broken or digest in self.disk.begun
            return
        if not isinstance(slot, Blocked):
            self.held.append(digest)
            assert self.loader.pool.tables.ranks[:, slot].tolist() == list(self.disk.ranks[digest])

    @rule(wanted=st.permutations("01234"))
    def read_ahead(self, wanted: list[str]) -> None:
        self.loader.read_ahead(refs(*wanted))

    @rule()
    def settle(self) -> None:
        self.reads.run()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.loader.release(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(digest=digests, pinned=st.booleans())
    def pin(self, digest: str, pinned: bool) -> None:
        self.loader.pin(ref(digest), pinned)
        self.loader.settle_pins()

    @rule(digest=digests)
    def forget(self, digest: str) -> None:
        if digest not in self.held:
            self.loader.forget(digest)
            assert not self.loader.pool.holds(digest)
            assert digest not in self.loader.cache

    @rule(digest=digests)
    def break_or_mend(self, digest: str) -> None:
        self.disk.broken ^= {digest}

    @invariant()
    def adds_up(self) -> None:
        self.loader.check_integrity()
        assert len(self.loader._reads) <= MAX_READS
        for digest, resident in self.loader.pool._residents.items():
            assert resident.references == self.held.count(digest)
        assert set(self.held) <= set(self.loader.pool.resident())

    def teardown(self) -> None:
        self.loader.close()


LoaderMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
TestLoader = LoaderMachine.TestCase
