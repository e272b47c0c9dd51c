"""The waiting sequences, in an order that is fair between groups."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass, field

from tenora.engine.sequence import Sequence


@dataclass(slots=True)
class _Group:
    service: float  # tokens served, divided by the weight
    weight: float = 1.0
    live: int = 0  # sequences waiting or running
    waiting: list[Sequence] = field(default_factory=list)  # sorted by Sequence.order


class FairQueue:
    """Waiting sequences by group; the group that was served least, relative to its weight, comes first.

    Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each computed token
    is charged to its group; a group that was away starts no lower than the least served active one, so that idling
    earns no credit, and keeps its debt, so that leaving and coming back wipes out nothing.
    """

    def __init__(self) -> None:
        self._groups: dict[str, _Group] = {}
        self._floor = 0.0
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        for group in self._groups.values():
            yield from group.waiting

    def enter(self, sequence: Sequence) -> None:
        """Add a new sequence. Its group counts as active until `leave`."""
        name = sequence.request.group
        group = self._groups.get(name)
        if group is None:
            group = self._groups[name] = _Group(service=self._floor)
        if group.live == 0:
            group.service = max(group.service, self._least_served())
        group.weight = max(sequence.request.weight, 1e-6)
        group.live += 1
        self.requeue(sequence)

    def requeue(self, sequence: Sequence) -> None:
        """Put a running sequence back among the waiting ones, in its old place."""
        insort(self._groups[sequence.request.group].waiting, sequence, key=lambda waiting: waiting.order)
        self._waiting += 1

    def take(self, sequence: Sequence) -> None:
        """Remove a waiting sequence (it runs now, or is about to leave)."""
        self._groups[sequence.request.group].waiting.remove(sequence)
        self._waiting -= 1

    def leave(self, sequence: Sequence) -> None:
        """A sequence that no longer waits has ended."""
        self._groups[sequence.request.group].live -= 1
        self._floor = max(self._floor, self._least_served())
        if not any(group.live for group in self._groups.values()):
            self._floor = 0.0
            self._groups.clear()
        elif len(self._groups) > 1024:
            self._groups = {n: g for n, g in self._groups.items() if g.live or g.service > self._floor}

    def charge(self, sequence: Sequence, end: int) -> None:
        """Charge the group for the tokens up to `end` that were not charged yet."""
        if end > sequence.charged:
            group = self._groups[sequence.request.group]
            group.service += (end - sequence.charged) / group.weight
            sequence.charged = end

    def candidates(self) -> Iterator[Sequence]:
        """Each waiting sequence once, fairest first, as charges stand at that moment.

        Sequences may be taken during iteration; one that was taken before its turn is yielded all the same.
        """
        pending = [(group, list(reversed(group.waiting))) for group in self._groups.values() if group.waiting]
        while pending:
            turn = min(range(len(pending)), key=lambda index: pending[index][0].service)
            _, sequences = pending[turn]
            yield sequences.pop()
            if not sequences:
                del pending[turn]

    def _least_served(self) -> float:
        return min((group.service for group in self._groups.values() if group.live), default=self._floor)
