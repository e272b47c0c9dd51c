"""Prepared adapters in host memory, between the disk and the slots: a byte budget, the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict

from tenora.adapters.prepared import PreparedAdapter


class HostCache:
    """Adapters that were read and can be inserted by one copy. Not thread-safe: the step loop owns it.

    It holds what is read ahead of a slot and, if the budget is larger than the slots', what was inserted before. An
    adapter larger than the whole budget is held alone, or it could never reach a slot.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self._adapters: OrderedDict[str, PreparedAdapter] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._adapters)

    def __contains__(self, digest: str) -> bool:
        return digest in self._adapters

    def digests(self) -> tuple[str, ...]:
        """What is held, least recently used first."""
        return tuple(self._adapters)

    def size(self, digest: str) -> int:
        """Bytes that an adapter takes here; 0 if it is not held."""
        held = self._adapters.get(digest)
        return 0 if held is None else held.nbytes

    def get(self, digest: str) -> PreparedAdapter | None:
        """An adapter, which counts as used now; None if it is not held."""
        held = self._adapters.get(digest)
        if held is not None:
            self._adapters.move_to_end(digest)
        return held

    def put(self, digest: str, adapter: PreparedAdapter) -> None:
        """Hold an adapter; others go until the budget is kept again."""
        self.discard(digest)
        self._adapters[digest] = adapter
        self.used_bytes += adapter.nbytes
        while self.used_bytes > self.max_bytes and len(self._adapters) > 1:
            _, gone = self._adapters.popitem(last=False)
            self.used_bytes -= gone.nbytes

    def discard(self, digest: str) -> None:
        """Hold an adapter no longer; nothing happens if it is not held."""
        gone = self._adapters.pop(digest, None)
        if gone is not None:
            self.used_bytes -= gone.nbytes

    def check_integrity(self) -> None:
        """Prove that the bytes are those of the adapters and within the budget; RuntimeError says what does not fit."""
        held = sum(adapter.nbytes for adapter in self._adapters.values())
        if held != self.used_bytes:
            raise RuntimeError(f"the host cache holds {held} bytes but counts {self.used_bytes}.")
        if held > self.max_bytes and len(self._adapters) > 1:
            raise RuntimeError(f"the host cache holds {held} bytes, more than its {self.max_bytes}.")
