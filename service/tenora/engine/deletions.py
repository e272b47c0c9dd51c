"""Deleted versions that a sequence may still use, and the compositions that go with them."""

from __future__ import annotations

from collections.abc import Callable, Collection

from tenora.adapters.ref import AdapterRef

_KEPT = 1024  # compositions that are known before any is looked for whether it is still held


class Deletions:
    """What is to be forgotten once no sequence uses it. A composition goes with the first of its parts."""

    def __init__(self, held: Callable[[], Collection[str]]) -> None:
        """`held` gives the digests of all that the engine holds anything of, keys and values included."""
        self._held = held
        self._pending: set[str] = set()
        self._compositions: dict[str, frozenset[str]] = {}  # digest → its parts'
        self._most = _KEPT

    def used(self, ref: AdapterRef) -> None:
        """A sequence or a pin comes with it: what was deleted has been stored again meanwhile."""
        self._pending.discard(ref.digest)
        if ref.composition is None or ref.digest in self._compositions:
            return
        if len(self._compositions) >= self._most:
            held = self._held()
            self._compositions = {digest: parts for digest, parts in self._compositions.items() if digest in held}
            self._most = max(_KEPT, 2 * len(self._compositions))
        self._compositions[ref.digest] = frozenset(ref.versions)

    def deleted(self, digest: str) -> None:
        """A version is gone."""
        self._pending.add(digest)
        self._pending |= {composed for composed, parts in self._compositions.items() if digest in parts}

    def due(self, in_use: Collection[str]) -> list[str]:
        """What is to be forgotten now, of which nothing is known here any more."""
        due = [digest for digest in self._pending if digest not in in_use]
        self._pending.difference_update(due)
        for digest in due:
            self._compositions.pop(digest, None)
        return due
