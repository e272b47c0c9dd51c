"""Adapters on their way to a slot: read from disk by a background thread, inserted by the step loop."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor

from tenora.adapters.peft_format import AdapterWeights
from tenora.adapters.pool import SlotPool
from tenora.adapters.ref import AdapterRef
from tenora.engine.scheduler import Blocked
from tenora.errors import PoolFullError, TenoraError, UnavailableError

_log = logging.getLogger(__name__)

MAX_STAGED = 8  # adapters read ahead of a slot: enough to hide the reading, bounded in host memory


class AdapterLoader:
    """Makes adapters resident in a `SlotPool`. Everything but the reading happens on the thread that calls it.

    Attributes:
        loads: adapters inserted so far.
        load_seconds: time spent reading them.
        failures: loads that failed.
    """

    def __init__(
        self, pool: SlotPool, read: Callable[[AdapterRef], AdapterWeights], wake: Callable[[], None] = lambda: None
    ) -> None:
        """`read` runs on the background thread; `wake` is called from there whenever a read has ended."""
        self.pool = pool
        self.loads = 0
        self.load_seconds = 0.0
        self.failures = 0
        self._read = read
        self._wake = wake
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="adapter-loader")
        self._staged: dict[str, Future[AdapterWeights]] = {}
        self._wanted_pins: dict[str, AdapterRef] = {}

    @property
    def idle(self) -> bool:
        """Whether nothing is being read."""
        return all(future.done() for future in self._staged.values())

    def prefetch(self, ref: AdapterRef) -> None:
        """Begin to read an adapter that will be needed, if it is not resident and there is room for one more."""
        if ref.digest not in self._staged and len(self._staged) < MAX_STAGED and ref.digest not in self.pool.resident():
            future = self._executor.submit(self._timed_read, ref)
            self._staged[ref.digest] = future
            future.add_done_callback(lambda _: self._wake())

    def acquire(self, ref: AdapterRef) -> int | Blocked:
        """A slot with one more reference, or why there is none yet.

        Raises:
            UnavailableError: the adapter cannot be loaded. The next call tries again.
        """
        slot = self.pool.acquire(ref.digest)
        if slot is not None:
            return slot
        self.prefetch(ref)
        future = self._staged.get(ref.digest)
        if future is None or not future.done():
            return Blocked.LOADING
        try:
            self.pool.insert(ref.digest, future.result())
        except PoolFullError:
            return Blocked.FULL
        except Exception as error:  # disk, format or memory: this adapter fails, nothing else
            del self._staged[ref.digest]
            self.failures += 1
            raise _unavailable(ref, error) from error
        del self._staged[ref.digest]
        self.loads += 1
        # Referenced in the same breath: another insertion could evict it otherwise.
        slot = self.pool.acquire(ref.digest)
        if slot is None:
            raise RuntimeError(f"adapter {ref.digest} vanished from the pool right after its insertion")
        return slot

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
            except UnavailableError as error:
                _log.warning("an adapter cannot be pinned", extra={"digest": ref.digest, "reason": error.message})
                del self._wanted_pins[ref.digest]
                continue
            if not isinstance(slot, Blocked):
                self.pool.pin(ref.digest)
                self.pool.release(ref.digest)
                del self._wanted_pins[ref.digest]

    def drop_unwanted(self, wanted: Collection[str]) -> None:
        """When reading ahead is at its limit, forget what was read for sequences that have ended meanwhile."""
        if len(self._staged) >= MAX_STAGED:
            for digest in [
                digest for digest in self._staged if digest not in wanted and digest not in self._wanted_pins
            ]:
                self._staged.pop(digest).cancel()

    def forget(self, digest: str) -> None:
        """The version was deleted and no sequence uses it: free its slot and host copy."""
        self._wanted_pins.pop(digest, None)
        if (staged := self._staged.pop(digest, None)) is not None:
            staged.cancel()
        self.pool.unpin(digest)
        self.pool.evict(digest)

    def close(self) -> None:
        """Start no more reads. One that hangs does not delay the caller."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    def _timed_read(self, ref: AdapterRef) -> AdapterWeights:
        started = time.monotonic()
        try:
            return self._read(ref)
        finally:
            self.load_seconds += time.monotonic() - started


def _unavailable(ref: AdapterRef, error: Exception) -> UnavailableError:
    if isinstance(error, TenoraError):
        reason = error.message
    elif isinstance(error, OSError):
        reason = f"its files cannot be read ({error.strerror or type(error).__name__})"
    else:
        reason = type(error).__name__
    _log.warning("an adapter could not be loaded", extra={"digest": ref.digest}, exc_info=error)
    return UnavailableError(f"The adapter could not be loaded: {reason}", code="adapter_unavailable")
