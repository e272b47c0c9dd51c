"""The scheduler's order in its plainest form, which looks at every share group: what the quick one must equal."""

from __future__ import annotations

from bisect import insort
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from itertools import islice

from tenora.adapters.ref import AdapterRef
from tenora.engine.blocks import BlockManager
from tenora.engine.fairness import FairQueue
from tenora.engine.scheduler import LOOK_AHEAD, Blocked, Residency, Scheduled, Scheduler
from tenora.engine.sequence import SequenceState


@dataclass
class _ShareGroup:
    service: float
    weight: float = 1.0
    live: int = 0
    waiting: list[SequenceState] = field(default_factory=list)


class SlowQueue(FairQueue):
    """`FairQueue` without an index."""

    def __init__(self) -> None:
        self.share_groups: dict[str, _ShareGroup] = {}
        self.floor = 0.0

    def __len__(self) -> int:
        return sum(len(share_group.waiting) for share_group in self.share_groups.values())

    def __iter__(self) -> Iterator[SequenceState]:
        for share_group in self.share_groups.values():
            yield from share_group.waiting

    def waiting_for(self, digest: str) -> list[SequenceState]:
        return [sequence for sequence in self if sequence.digest == digest]

    def enter(self, sequence: SequenceState) -> None:
        share_group = self.share_groups.setdefault(sequence.request.share_group, _ShareGroup(self.floor))
        if share_group.live == 0:
            share_group.service = max(share_group.service, self._least_served())
        share_group.weight = max(sequence.request.weight, 1e-6)
        share_group.live += 1
        self.requeue(sequence)

    def requeue(self, sequence: SequenceState) -> None:
        insort(self.share_groups[sequence.request.share_group].waiting, sequence, key=lambda waiting: waiting.order)

    def take(self, sequence: SequenceState) -> None:
        self.share_groups[sequence.request.share_group].waiting.remove(sequence)

    def leave(self, sequence: SequenceState) -> None:
        self.share_groups[sequence.request.share_group].live -= 1
        self.floor = max(self.floor, self._least_served())
        if not any(share_group.live for share_group in self.share_groups.values()):
            self.floor = 0.0
            self.share_groups.clear()

    def charge(self, sequence: SequenceState, end: int) -> None:
        if end > sequence.charged:
            share_group = self.share_groups[sequence.request.share_group]
            share_group.service += (end - sequence.charged) / share_group.weight
            sequence.charged = end

    def candidates(self, blocked: Collection[str] = ()) -> Iterator[SequenceState]:
        pending = [
            (share_group, list(reversed(share_group.waiting)))
            for share_group in self.share_groups.values()
            if share_group.waiting
        ]
        while pending:
            turn = min(range(len(pending)), key=lambda index: pending[index][0].service)
            _, sequences = pending[turn]
            yield sequences.pop()
            if not sequences:
                del pending[turn]

    def _least_served(self) -> float:
        return min(
            (share_group.service for share_group in self.share_groups.values() if share_group.live), default=self.floor
        )


class SlowScheduler(Scheduler):
    """`Scheduler` that asks every waiting sequence in turn."""

    def __init__(self, blocks: BlockManager, residency: Residency, *, max_num_seqs: int, max_num_batched_tokens: int):
        super().__init__(blocks, residency, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
        self.waiting = SlowQueue()

    def upcoming_adapters(self) -> Iterator[AdapterRef]:
        refs = [sequence.request.adapter for sequence in islice(self.waiting.candidates(), LOOK_AHEAD)]
        return iter(dict.fromkeys(ref for ref in refs if ref is not None))

    def _admit(self, batch: dict[SequenceState, Scheduled], budget: int) -> None:
        blocked: set[str] = set()
        slots_full = False
        for sequence in self.waiting.candidates():
            if budget == 0 or len(self.running) >= self.max_num_seqs:
                return
            if sequence.id not in self._by_id:
                continue
            if sequence.digest in blocked or (slots_full and sequence.digest):
                continue
            if isinstance(reason := self._acquire(sequence), Blocked):
                blocked.add(sequence.digest)
                slots_full |= reason is Blocked.FULL
                continue
            if sequence.id not in self._by_id:
                continue
            matched = self._match(sequence)
            if not self.blocks.can_hold(matched, len(sequence.token_ids), reserve=len(self.running)):
                self._release(sequence)
                return
            batch[sequence] = item = self._start(sequence, matched, budget)
            budget -= item.count
