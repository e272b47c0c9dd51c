"""The waiting sequences, in an order that is fair between share groups."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from operator import attrgetter

from tenora.engine.sequence import SequenceState

_FEWEST_KEPT = 1024  # share groups that are remembered however few of them have a sequence
_order = attrgetter("order")


@dataclass(slots=True, eq=False)
class _ShareGroup:
    """A share group's account.

    Attributes:
        number: order of arrival, the tie-breaker between share groups that were served alike.
        service: tokens served, divided by the weight.
        live: sequences waiting or running.
        waiting: sorted by `SequenceState.order`.
        turn: its entry in `FairQueue._turns` while it is live.
    """

    number: int
    service: float
    weight: float = 1.0
    live: int = 0
    waiting: list[SequenceState] = field(default_factory=list)
    turn: _Turn | None = None


_Turn = tuple[float, int, _ShareGroup]  # no two have a number in common, so share groups are never compared


class FairQueue:
    """Waiting sequences by share group; the one that was served least, relative to its weight, comes first.

    Virtual token counters (Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024): each computed token
    is charged to its share group; one that was away starts no lower than the least served active one, so that idling
    earns no credit, and keeps its debt, so that leaving and coming back wipes out nothing.

    A step costs in proportion to the share groups that it charged and the sequences that it looks at, not to those that
    wait: live share groups are kept in order, and only those that were charged find a new place.
    """

    def __init__(self) -> None:
        self._share_groups: dict[str, _ShareGroup] = {}
        self._floor = 0.0
        self._turns: list[_Turn] = []  # of the live share groups, sorted, but for those in `_charged`
        self._charged: set[_ShareGroup] = set()
        self._by_digest: dict[str, dict[SequenceState, None]] = {}  # all that wait, in the order in which they came
        self._arrivals = 0  # of share groups
        self._kept = _FEWEST_KEPT
        self._waiting = 0

    def __len__(self) -> int:
        return self._waiting

    def __iter__(self) -> Iterator[SequenceState]:
        for share_group in self._share_groups.values():
            yield from share_group.waiting

    def digests(self) -> list[str]:
        """The adapters that are waited for, each once; "" is the base."""
        return list(self._by_digest)

    def waiting_for(self, digest: str) -> list[SequenceState]:
        """The waiting sequences of one adapter, or of the base with ""."""
        return list(self._by_digest.get(digest, ()))

    def enter(self, sequence: SequenceState) -> None:
        """Add a new sequence. Its share group counts as active until `leave`."""
        name = sequence.request.share_group
        share_group = self._share_groups.get(name)
        if share_group is None:
            self._arrivals += 1
            share_group = self._share_groups[name] = _ShareGroup(self._arrivals, service=self._floor)
        if share_group.live == 0:
            share_group.service = max(share_group.service, self._least_served())
            share_group.turn = (share_group.service, share_group.number, share_group)
            insort(self._turns, share_group.turn)
        share_group.weight = max(sequence.request.weight, 1e-6)
        share_group.live += 1
        self.requeue(sequence)

    def requeue(self, sequence: SequenceState) -> None:
        """Put a running sequence back among the waiting ones, in its old place."""
        insort(self._share_groups[sequence.request.share_group].waiting, sequence, key=_order)
        self._by_digest.setdefault(sequence.digest, {})[sequence] = None
        self._waiting += 1

    def take(self, sequence: SequenceState) -> None:
        """Remove a waiting sequence (it runs now, or is about to leave)."""
        self._share_groups[sequence.request.share_group].waiting.remove(sequence)
        same = self._by_digest[sequence.digest]
        del same[sequence]
        if not same:
            del self._by_digest[sequence.digest]
        self._waiting -= 1

    def leave(self, sequence: SequenceState) -> None:
        """A sequence that no longer waits has ended."""
        share_group = self._share_groups[sequence.request.share_group]
        share_group.live -= 1
        if share_group.live == 0:
            self._settle()
            self._remove(share_group)
        self._floor = max(self._floor, self._least_served())
        if not self._turns:
            self._floor = 0.0
            self._share_groups.clear()
        elif len(self._share_groups) > self._kept:
            self._share_groups = {n: g for n, g in self._share_groups.items() if g.live or g.service > self._floor}
            self._kept = max(_FEWEST_KEPT, 2 * len(self._share_groups))  # so that looking at all of them is rare

    def charge(self, sequence: SequenceState, end: int) -> None:
        """Charge the share group for the tokens up to `end` that were not charged yet."""
        if end > sequence.charged:
            share_group = self._share_groups[sequence.request.share_group]
            share_group.service += (end - sequence.charged) / share_group.weight
            sequence.charged = end
            self._charged.add(share_group)

    def candidates(self, blocked: frozenset[str] | set[str] = frozenset()) -> Iterator[SequenceState]:
        """Each waiting sequence once, fairest first, as charges stand now.

        Args:
            blocked: adapters whose sequences are passed over; it may grow during iteration.

        Sequences may be taken and may leave during iteration; those that did before their turn are not yielded.
        """
        self._settle()
        for _, _, share_group in tuple(self._turns):
            for sequence in tuple(share_group.waiting):
                if sequence.digest not in blocked and sequence in self._by_digest.get(sequence.digest, ()):
                    yield sequence

    def _least_served(self) -> float:
        self._settle()
        return self._turns[0][0] if self._turns else self._floor

    def _settle(self) -> None:
        """Bring the share groups that were charged to their places."""
        for share_group in self._charged:
            if share_group.turn is not None:
                self._remove(share_group)
                share_group.turn = (share_group.service, share_group.number, share_group)
                insort(self._turns, share_group.turn)
        self._charged.clear()

    def _remove(self, share_group: _ShareGroup) -> None:
        """Take a share group's turn away."""
        if share_group.turn is not None:
            del self._turns[bisect_left(self._turns, share_group.turn)]
            share_group.turn = None
