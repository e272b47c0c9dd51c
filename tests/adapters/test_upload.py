"""Adapters arrive beside what the device computes: proved on two queues that run as late or as early as they may."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from tenora.adapters import upload
from tenora.adapters.pool import SlotPool
from tenora.adapters.upload import Upload, Uploader
from tests.adapters.test_pool import assert_holds
from tests.adapters.weights import ROWS, TARGETS, adapter, prepared
from tests.support.patience import PATIENCE


class Place:
    """An event: so many operations of a queue."""

    def __init__(self, queue: Queue) -> None:
        self.queue, self.count = queue, len(queue.waiting) + queue.done

    def synchronize(self) -> None:
        self.queue.run(self.count)


class Queue:
    """A stream of a device: runs what it was given in order, when somebody needs it to have run and not before."""

    def __init__(self) -> None:
        self.waiting: list[Callable[[], object]] = []
        self.done = 0

    def give(self, work: Callable[[], object]) -> Place:
        self.waiting.append(work)
        return Place(self)

    def run(self, count: int) -> None:
        while self.done < count:
            self.done += 1
            self.waiting.pop(0)()


class LateStreams:
    """`Streams` whose copies read and write when they run, not when they are asked for."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.computing, self.copying = Queue(), Queue()
        self.broken = False

    def pinned(self, nbytes: int) -> Tensor:
        return torch.zeros(nbytes, dtype=torch.uint8)

    def computed(self) -> Place:
        return Place(self.computing)

    def copies_after(self, event: Any) -> None:
        with self.lock:
            self.copying.give(event.synchronize)

    def copy(self, target: Tensor, source: Tensor) -> Place:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        with self.lock:
            return self.copying.give(lambda: target.copy_(source))

    def computes_after(self, event: Any) -> None:
        with self.lock:
            self.computing.give(event.synchronize)

    def compute(self, work: Callable[[], object]) -> None:
        """What the step loop launches."""
        with self.lock:
            self.computing.give(work)

    def copy_now(self) -> None:
        """The copies are done as early as they may be."""
        with self.lock:
            self.copying.run(self.copying.done + len(self.copying.waiting))

    def finish(self) -> None:
        """The device gets to the end of what it computes; copies that nobody waits for are not done."""
        with self.lock:
            self.computing.run(self.computing.done + len(self.computing.waiting))


class PromptStreams(LateStreams):
    """The computing stream is the step loop itself here: what it waits for is done when the call returns."""

    def computes_after(self, event: Any) -> None:
        super().computes_after(event)
        self.finish()


@pytest.fixture
def streams() -> LateStreams:
    return LateStreams()


@pytest.fixture
def small_ring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upload, "BLOCK_BYTES", 64)


def make_pool(streams: LateStreams, elements: int = 1024, slots: int = 4) -> SlotPool:
    return SlotPool(
        ROWS,
        max_slots=slots,
        max_bytes=4 * elements,
        dtype=torch.float32,
        device=torch.device("cpu"),
        uploader=Uploader(streams),
    )


def put(pool: SlotPool, digest: str, ranks: tuple[int, int, int], seed: int = 0) -> Any:
    weights = adapter(ranks, seed)
    pool.insert(digest, prepared(weights, torch.float32))
    return weights


def arrived(pool: SlotPool, digest: str) -> int:
    """Its slot, with a reference, when the upload's thread is done."""
    under_way = pool._residents[digest].upload
    assert isinstance(under_way, Upload)
    wait([under_way.copied], timeout=PATIENCE)
    slot = pool.acquire(digest)
    assert slot is not None
    return slot


def test_an_adapter_cannot_be_used_before_it_was_copied_and_what_is_computed_then_sees_all_of_it(
    streams: LateStreams, small_ring: None
) -> None:
    """Many times as large as the ring: a block that were written again too early would show."""
    pool = make_pool(streams)
    weights = put(pool, "a", (5, 7, 3))
    assert pool.holds("a")
    assert not pool.tables.ranks.any(), "nobody can read what is not there yet"
    slot = arrived(pool, "a")
    streams.compute(lambda: assert_holds(pool, slot, weights))
    streams.finish()
    pool.check_integrity()


def test_host_memory_is_pinned_once_and_not_for_each_adapter(streams: LateStreams, small_ring: None) -> None:
    pinned: list[int] = []
    real = streams.pinned

    def counted(nbytes: int) -> Tensor:
        pinned.append(nbytes)
        return real(nbytes)

    streams.pinned = counted  # type: ignore[method-assign]
    pool = make_pool(streams)
    for name in "ab":
        put(pool, name, (5, 7, 3))
        arrived(pool, name)
    assert pinned == [upload.BLOCK_BYTES] * upload.BLOCKS


class Stream:
    """A stream of CUDA that notes what it was told."""

    def __init__(self) -> None:
        self.waited: list[object] = []
        self.event = object()

    def record_event(self) -> object:
        return self.event

    def wait_event(self, event: object) -> None:
        self.waited.append(event)


def test_on_a_gpu_adapters_are_copied_by_a_stream_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    computing, copying = Stream(), Stream()
    within: list[Stream] = []

    @contextmanager
    def current(stream: Stream) -> Iterator[None]:
        within.append(stream)
        yield
        within.append(computing)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: computing)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: copying)
    monkeypatch.setattr(torch.cuda, "stream", current)
    monkeypatch.setattr(upload.CudaStreams, "pinned", lambda _, nbytes: torch.zeros(nbytes, dtype=torch.uint8))
    uploader = upload.uploader_for(torch.device("cuda"), lambda: None)
    assert uploader is not None
    target = torch.zeros(4, dtype=torch.uint8)
    under_way = uploader.start(target, torch.arange(4, dtype=torch.uint8))
    wait([under_way.copied], timeout=PATIENCE)
    assert target.tolist() == [0, 1, 2, 3]
    assert within == [copying, computing]
    assert (copying.waited, computing.waited) == ([computing.event], [])
    under_way.finish()
    assert computing.waited == [copying.event]
    assert upload.uploader_for(torch.device("cpu"), lambda: None) is None


def test_until_it_has_arrived_it_has_no_slot_for_anybody(streams: LateStreams) -> None:
    pool = make_pool(streams)
    begun, go = threading.Event(), threading.Event()

    def held(target: Tensor, source: Tensor) -> Place:
        begun.set()
        assert go.wait(PATIENCE)
        return LateStreams.copy(streams, target, source)

    streams.copy = held  # type: ignore[method-assign]
    put(pool, "a", (2, 2, 2))
    assert begun.wait(PATIENCE)
    assert pool.acquire("a") is None
    assert pool.insert("a", prepared(adapter((2, 2, 2)), torch.float32)) == pool._residents["a"].slot, "it is coming"
    pool.check_integrity()
    go.set()
    arrived(pool, "a")


def test_what_was_launched_before_still_reads_the_adapter_that_had_to_go(streams: LateStreams) -> None:
    pool = make_pool(streams, elements=64, slots=1)
    old = put(pool, "old", (2, 2, 1))
    slot = arrived(pool, "old")
    streams.finish()
    a = pool.tables.a(0, slot)
    seen: list[Tensor] = []
    streams.compute(lambda: seen.append(a.clone()))  # a step that has been launched and has not run
    pool.release("old")
    new = put(pool, "new", (2, 2, 1), seed=1)
    slot = arrived(pool, "new")
    streams.copy_now()
    streams.compute(lambda: assert_holds(pool, slot, new))
    streams.finish()
    wanted = torch.from_numpy(old.modules[TARGETS[0].path].a)
    assert torch.equal(seen[0], wanted), "it was overwritten under a running step"


def test_one_that_is_deleted_on_its_way_goes_when_it_has_arrived(streams: LateStreams) -> None:
    pool = make_pool(streams)
    put(pool, "a", (2, 2, 2))
    used = pool.used_bytes
    assert not pool.evict("a")
    assert pool.used_bytes == used, "its room is being written"
    under_way = pool._residents["a"].upload
    assert under_way is not None
    wait([under_way.copied], timeout=PATIENCE)
    assert pool.acquire("a") is None
    assert not pool.holds("a")
    assert pool.used_bytes == 0
    pool.check_integrity()


def test_one_that_nobody_asks_for_any_more_is_taken_in(streams: LateStreams) -> None:
    pool = make_pool(streams)
    put(pool, "a", (2, 2, 2))
    under_way = pool._residents["a"].upload
    assert under_way is not None
    wait([under_way.copied], timeout=PATIENCE)
    pool.settle()
    assert pool._residents["a"].references == 0
    pool.check_integrity()


def test_nothing_is_moved_while_it_is_written() -> None:
    """Four fill the pool. What comes next needs two holes that one on its way and one in use lie between."""
    streams = PromptStreams()
    pool = make_pool(streams, elements=192, slots=5)
    weights = {name: put(pool, name, (2, 2, 0), seed) for seed, name in enumerate("abcd")}
    for name in "abcd":
        arrived(pool, name)
    assert pool.used_bytes == pool.max_bytes
    for name in "bd":
        pool.release(name)
        pool.evict(name)
    weights["x"] = put(pool, "x", (2, 2, 0), 7)  # into the first hole
    pool.release("a")
    pool.evict("a")
    weights["y"] = put(pool, "y", (4, 4, 0), 8)
    slots = {"c": pool.acquire("c"), "x": pool.acquire("x"), "y": arrived(pool, "y")}
    assert pool.moved_bytes > 0

    def check() -> None:
        for name, slot in slots.items():
            assert slot is not None
            assert_holds(pool, slot, weights[name])

    streams.compute(check)
    streams.finish()
    pool.check_integrity()


@pytest.mark.parametrize("asked_for_again", [True, False])
def test_an_upload_that_fails_is_not_the_fault_of_who_needs_the_room(asked_for_again: bool) -> None:
    """As above: what comes next has to wait for the one on its way, and that one's copy fails."""
    streams = PromptStreams()
    pool = make_pool(streams, elements=192, slots=5)
    for name in "abcd":
        put(pool, name, (2, 2, 0))
        arrived(pool, name)
    for name in "bd":
        pool.release(name)
        pool.evict(name)
    streams.broken = True
    put(pool, "x", (2, 2, 0))
    under_way = pool._residents["x"].upload
    assert under_way is not None
    wait([under_way.copied], timeout=PATIENCE)
    streams.broken = False
    pool.release("a")
    pool.evict("a")
    weights = put(pool, "y", (4, 4, 0), 8)
    assert_holds(pool, arrived(pool, "y"), weights)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        pool.acquire("x") if asked_for_again else pool.settle()
    assert pool.acquire("x") is None
    assert not pool.holds("x")
    pool.settle()
    pool.check_integrity()


def test_an_upload_that_fails_leaves_no_adapter_behind_and_can_be_tried_again(streams: LateStreams) -> None:
    pool = make_pool(streams)
    streams.broken = True
    put(pool, "a", (2, 2, 2))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        arrived(pool, "a")
    assert not pool.holds("a")
    assert pool.used_bytes == 0
    pool.check_integrity()
    streams.broken = False
    put(pool, "a", (2, 2, 2))
    arrived(pool, "a")
