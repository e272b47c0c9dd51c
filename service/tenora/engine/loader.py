"""Adapters on their way to a slot: read and prepared by a background thread, inserted by the step loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

from tenora.adapters.host_cache import HostCache
from tenora.adapters.pool import SlotPool
from tenora.adapters.prepared import PreparedAdapter
from tenora.adapters.ref import AdapterRef
from tenora.engine.scheduler import Blocked
from tenora.errors import (
    AdapterDamagedError,
    AdapterFormatError,
    CompositionError,
    PoolFullError,
    TenoraError,
    UnavailableError,
)
from tenora.model.device import survive

_log = logging.getLogger(__name__)

MAX_READS = 4  # begun and not collected: the thread never idles between two steps, and who comes next waits for few


class AdapterLoader:
    """Makes adapters resident in a `SlotPool`. Everything but the reading happens on the thread that calls it.

    Attributes:
        loads: adapters inserted so far.
        load_seconds: time spent reading and preparing them.
        failures: loads that failed.
    """

    def __init__(
        self,
        pool: SlotPool,
        read: Callable[[AdapterRef], PreparedAdapter],
        cache: HostCache,
        wake: Callable[[], None] = lambda: None,
    ) -> None:
        """`read` runs on the background thread; `wake` is called from there whenever a read has ended."""
        self.pool = pool
        self.cache = cache
        self.loads = 0
        self.load_seconds = 0.0
        self.failures = 0
        self._read = read
        self._wake = wake
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._reads: dict[str, Future[PreparedAdapter]] = {}
        self._errors: dict[str, Exception] = {}  # of reads, until somebody asks for the adapter
        self._offered: dict[str, PreparedAdapter] = {}  # without a file; they stay until they are forgotten
        self._wanted_pins: dict[str, AdapterRef] = {}
        # Among as many copies of what was inserted last as a smaller cache holds, hardly any would have left its slot.
        self._keeps_inserted = cache.max_bytes > pool.max_bytes
        self._room = cache.max_bytes  # of the cache, for reads that have not begun
        self._holds_wanted = False  # the cache, something that has no slot yet
        self._last_size = 0  # of a prepared adapter: the guess for those that are being read

    @property
    def idle(self) -> bool:
        """Whether nothing is being read."""
        return all(future.done() for future in self._reads.values())

    def read_ahead(self, refs: Iterable[AdapterRef]) -> None:
        """Begin to read adapters that will be needed soon, as far as the host cache can hold them.

        Args:
            refs: the one that is needed first comes first; it is also the last one that the cache lets go.
        """
        self._collect()
        self._take_in()
        self._room = self.cache.max_bytes - len(self._reads) * self._last_size
        self._holds_wanted = False
        held: list[str] = []
        for ref in refs:
            if self.pool.holds(ref.digest) or ref.digest in self._offered:
                continue
            if ref.digest in self.cache:
                held.append(ref.digest)
                self._room -= self.cache.size(ref.digest)
            self._holds_wanted = bool(held)
            self._begin(ref)
        for digest in reversed(held):
            self.cache.get(digest)

    def acquire(self, ref: AdapterRef) -> int | Blocked:
        """A slot with one more reference, or why there is none yet.

        Raises:
            AdapterDamagedError, AdapterFormatError, CompositionError: it cannot be loaded and will not be as it is.
            UnavailableError: it could not be loaded this time. After any of them the next call tries again.
        """
        try:
            slot = self.pool.acquire(ref.digest)
        except Exception as error:  # it did not arrive: this adapter fails, nothing else
            survive(error, self.pool.tables.arena.device)
            raise self._failure(ref, error) from error
        if slot is not None:
            return slot
        if self.pool.holds(ref.digest):
            return Blocked.LOADING
        self._collect()
        if (unread := self._errors.pop(ref.digest, None)) is not None:
            raise self._failure(ref, unread) from unread
        adapter = self._offered.get(ref.digest) or self.cache.get(ref.digest)
        if adapter is None:
            self._begin(ref)
            return Blocked.LOADING
        try:
            self.pool.insert(ref.digest, adapter)
        except PoolFullError:
            return Blocked.LOADING if self.pool.fills else Blocked.FULL
        except Exception as error:  # too large, or memory: this adapter fails, nothing else
            survive(error, self.pool.tables.arena.device)
            self.cache.discard(ref.digest)
            raise self._failure(ref, error) from error
        self.loads += 1
        if not self._keeps_inserted:
            self.cache.discard(ref.digest)
        # Referenced in the same breath: another insertion could evict it otherwise. On its way nobody can.
        slot = self.pool.acquire(ref.digest)
        return Blocked.LOADING if slot is None else slot

    def invocation(self, digest: str) -> tuple[int, ...]:
        """The tokens from which on an acquired adapter acts; empty: on all."""
        return self.pool.invocation(digest)

    def held(self) -> set[str]:
        """Digests of all that has a slot or a host copy, or is being read."""
        return {*self.pool.resident(), *self.cache.digests(), *self._reads}

    def offer(self, digest: str, adapter: PreparedAdapter) -> None:
        """Let an adapter be acquired that no file holds, whenever there is a slot, until `forget`."""
        self._offered[digest] = adapter

    def release(self, digest: str) -> None:
        """Give one reference back; the adapter stays until its slot is needed."""
        self.pool.release(digest)

    def pin(self, ref: AdapterRef, pinned: bool) -> None:
        """Load it and keep its slot, or no longer keep it."""
        if pinned:
            self._wanted_pins[ref.digest] = ref
        else:
            self._wanted_pins.pop(ref.digest, None)
            self.pool.unpin(ref.digest)

    def settle_pins(self) -> None:
        """Pin what was asked for and can be pinned by now."""
        for ref in list(self._wanted_pins.values()):
            try:
                slot = self.acquire(ref)
            except TenoraError as error:
                _log.warning("an adapter cannot be pinned", extra={"digest": ref.digest, "reason": error.message})
                del self._wanted_pins[ref.digest]
                continue
            if not isinstance(slot, Blocked):
                self.pool.pin(ref.digest)
                self.pool.release(ref.digest)
                del self._wanted_pins[ref.digest]

    def drop_unwanted(self, wanted: Collection[str]) -> None:
        """Forget the errors of adapters that nobody waits for any more: who comes later tries again."""
        for digest in [digest for digest in self._errors if digest not in wanted and digest not in self._wanted_pins]:
            del self._errors[digest]

    def forget(self, digest: str) -> None:
        """The version was deleted and no sequence uses it: free its slot and host copy."""
        self._wanted_pins.pop(digest, None)
        self._errors.pop(digest, None)
        self._offered.pop(digest, None)
        if (read := self._reads.pop(digest, None)) is not None:
            read.cancel()
        self.cache.discard(digest)
        self.pool.unpin(digest)
        self.pool.evict(digest)

    def check_integrity(self) -> None:
        """Raise unless slots, arena and host copies can be accounted for."""
        self.pool.check_integrity()
        self.cache.check_integrity()

    def close(self) -> None:
        """Start no more reads. One that hangs does not delay the caller."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self.pool.close()

    def _begin(self, ref: AdapterRef) -> None:
        """Read an adapter in the background, unless that is under way, has failed, or must wait for others."""
        known = ref.digest in self.cache or ref.digest in self._reads or ref.digest in self._errors
        if known or len(self._reads) >= MAX_READS:
            return
        if self._room <= 0 and (self._reads or self._holds_wanted):
            return  # it would push out what is needed sooner
        self._room -= self._last_size
        future = self._executor.submit(self._timed_read, ref)
        self._reads[ref.digest] = future
        future.add_done_callback(lambda _: self._wake())

    def _collect(self) -> None:
        """Take over what has been read meanwhile."""
        # What was begun first is needed first, so it is put last and stays longest.
        for digest in [digest for digest, future in reversed(self._reads.items()) if future.done()]:
            future = self._reads.pop(digest)
            error = future.exception()
            if error is None:
                adapter = future.result()
                self._last_size = adapter.nbytes
                self.cache.put(digest, adapter)
            elif isinstance(error, Exception):  # disk, format or memory: this adapter fails, nothing else
                survive(error, self.pool.tables.arena.device)  # pinned memory is the device's business
                self._errors[digest] = error
            else:
                raise error

    def _take_in(self) -> None:
        """Let the pool take in what has arrived on the device though nobody asks for it any more."""
        try:
            self.pool.settle()
        except Exception as error:  # noqa: BLE001  # who asks for it again has it loaded again
            survive(error, self.pool.tables.arena.device)
            _log.warning("an adapter did not arrive on the device", exc_info=error)

    def _failure(self, ref: AdapterRef, error: Exception) -> TenoraError:
        self.failures += 1
        _log.warning("an adapter could not be loaded", extra={"digest": ref.digest}, exc_info=error)
        if isinstance(error, AdapterDamagedError | AdapterFormatError | CompositionError):
            return error
        return _unavailable(error)

    def _timed_read(self, ref: AdapterRef) -> PreparedAdapter:
        started = time.monotonic()
        try:
            return self._read(ref)
        finally:
            self.load_seconds += time.monotonic() - started


def _unavailable(error: Exception) -> UnavailableError:
    """What may pass by itself: a disk that cannot be read now, memory."""
    if isinstance(error, TenoraError):
        reason = error.message
    elif isinstance(error, OSError):
        reason = f"its files cannot be read ({error.strerror or type(error).__name__})"
    else:
        reason = type(error).__name__
    return UnavailableError(f"The adapter could not be loaded: {reason}", code="adapter_unavailable")
