"""Chooses what the next step computes: continuous batching with chunked prefill, fair admission and preemption."""

from __future__ import annotations

import enum
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

from tenora.adapters.invocation import adapted_from
from tenora.adapters.ref import AdapterRef
from tenora.engine.blocks import BlockManager
from tenora.engine.fairness import FairQueue
from tenora.engine.sequence import SequenceState
from tenora.errors import ConflictError, ContextLengthError, TenoraError

LOOK_AHEAD = 32  # waiting sequences whose adapters are read while others run


class Blocked(enum.Enum):
    """Why an adapter has no slot yet."""

    LOADING = "its weights are being read"
    FULL = "every slot is in use"


class Residency(Protocol):
    """Gives adapters a slot on the device."""

    def acquire(self, ref: AdapterRef) -> int | Blocked:
        """The slot, with one more reference; or why there is none yet. TenoraError if it cannot be loaded."""
        ...

    def invocation(self, digest: str) -> tuple[int, ...]:
        """The tokens from which on an acquired adapter acts (`tenora.adapters.invocation`); empty: on all."""
        ...

    def release(self, digest: str) -> None:
        """Give one reference back."""
        ...


class Prefixes(Protocol):
    """Lays the virtual tokens of adapters into KV blocks."""

    def count(self, slot: int) -> int:
        """Virtual tokens of the adapter in a slot; 0 if it has none. TenoraError if they cannot be served."""
        ...

    def lay(self, slot: int, start: int, blocks: Sequence[int]) -> None:
        """Fill positions from `start` up to the adapter's count in a block table. TenoraError if that fails."""
        ...


@dataclass(frozen=True, slots=True)
class Scheduled:
    """Tokens [start, start + count) of a sequence are computed in this step, all with its adapter or all without."""

    sequence: SequenceState
    start: int
    count: int

    @property
    def slot(self) -> int:
        """The adapter slot of these tokens; -1 is the base."""
        return self.sequence.slot if self.start >= self.sequence.adapted_from else -1

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end, so that its next token can be sampled."""
        return self.start + self.count == len(self.sequence.token_ids)


class Scheduler:
    """Owns the waiting and the running sequences, and through them all block tables and slot references.

    A sequence runs only with KV blocks **and** an adapter slot. Decodes come first in a step, then prefill chunks, then
    newcomers, within `max_num_batched_tokens`. When blocks run out, the share group that holds the most of them gives
    up its least urgent, newest sequence: it waits again and is recomputed, often from its own cached prefix.
    """

    def __init__(
        self,
        blocks: BlockManager,
        residency: Residency,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        max_model_len: int = 2**62,
        prefixes: Prefixes | None = None,
    ) -> None:
        """Nothing waits. `max_model_len` bounds virtual tokens and prompt together; no `prefixes`: there are none."""
        self.blocks = blocks
        self.residency = residency
        self.max_model_len = max_model_len
        self.prefixes = prefixes
        self.max_num_seqs = min(max_num_seqs, max_num_batched_tokens)  # so that every decode fits into every step
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting = FairQueue()
        self.running: list[SequenceState] = []
        self.failed: list[tuple[SequenceState, TenoraError]] = []  # ended by the last `schedule`
        self.adapter_use: Counter[str] = Counter()  # digest → live sequences
        self.preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._by_id: dict[str, SequenceState] = {}

    def add(self, sequence: SequenceState) -> None:
        """Let a new sequence wait for its turn. Raises ValueError for an id that is live already."""
        if sequence.id in self._by_id:
            raise ValueError(f"request id {sequence.id!r} is in use")
        self._by_id[sequence.id] = sequence
        self.adapter_use[sequence.digest] += 1
        self.waiting.enter(sequence)

    def get(self, request_id: str) -> SequenceState | None:
        """The live sequence of a request, or None."""
        return self._by_id.get(request_id)

    def live(self) -> list[SequenceState]:
        """Every sequence that has not ended."""
        return list(self._by_id.values())

    def schedule(self) -> list[Scheduled]:
        """Plan one step. Sequences whose adapter cannot be loaded are ended and left in `failed`."""
        self.failed = []
        before = self.preemptions
        batch, budget = self._continue_running()
        if self.preemptions == before:
            self._admit(batch, budget)
        for item in batch.values():
            self.waiting.charge(item.sequence, item.start + item.count)
        return list(batch.values())

    def upcoming_adapters(self) -> Iterator[AdapterRef]:
        """The adapters of the next sequences to be admitted, each once, the most urgent one first."""
        if not len(self.waiting):
            return
        seen: set[str] = set()
        for sequence in islice(self.waiting.candidates(), LOOK_AHEAD):
            if (ref := sequence.request.adapter) is not None and ref.digest not in seen:
                seen.add(ref.digest)
                yield ref

    def computed(self, item: Scheduled) -> None:
        """A step succeeded: the tokens of `item` lie in the cache, and blocks that are full now become findable."""
        sequence = item.sequence
        first = sequence.context
        sequence.num_computed = item.start + item.count
        self._register(sequence, first, sequence.context)

    def finish(self, sequence: SequenceState) -> None:
        """End a sequence, running or waiting, and give back everything it holds."""
        if self._by_id.pop(sequence.id, None) is None:
            return
        if sequence in self.running:
            self.running.remove(sequence)
            self._release(sequence)
        else:
            self.waiting.take(sequence)
        self.waiting.leave(sequence)
        self.adapter_use[sequence.digest] -= 1
        if not self.adapter_use[sequence.digest]:
            del self.adapter_use[sequence.digest]

    def check_integrity(self) -> None:
        """Raise BlockIntegrityError unless every held block belongs to a running sequence."""
        self.blocks.check_integrity(sequence.block_table for sequence in self.live())

    def _register(self, sequence: SequenceState, first: int, last: int) -> None:
        """Make findable what became full while positions [first, last) were filled."""
        size = self.blocks.block_size
        if last // size == first // size:
            return  # no block became full: most decode steps
        hashes = sequence.hashes(size, last - sequence.offset)
        for index in range(first // size, last // size):
            # What the base computed outlives the adapter.
            digest = sequence.digest if (index + 1) * size > sequence.adapted_from else ""
            self.blocks.register(sequence.block_table[index], hashes[index], digest, sequence.request.cache_salt)

    def _continue_running(self) -> tuple[dict[SequenceState, Scheduled], int]:
        batch: dict[SequenceState, Scheduled] = {}
        budget = self.max_num_batched_tokens
        for sequence in sorted(self.running, key=lambda running: running.remaining > 1):  # stable: admission order
            if budget == 0:
                break
            if not sequence.block_table:
                continue  # preempted for one of the sequences before it
            count = min(sequence.alike, budget)
            while not self.blocks.grow(sequence.block_table, sequence.context + count):
                victim = self._victim()
                self._preempt(victim)
                if victim in batch:
                    budget += batch.pop(victim).count
                if victim is sequence:
                    break
            else:
                batch[sequence] = Scheduled(sequence, sequence.num_computed, count)
                budget -= count
        return batch, budget

    def _admit(self, batch: dict[SequenceState, Scheduled], budget: int) -> None:
        if budget == 0 or len(self.running) >= self.max_num_seqs or not len(self.waiting):
            return
        blocked: set[str] = set()
        for sequence in self.waiting.candidates(blocked):
            if isinstance(reason := self._acquire(sequence), Blocked):
                blocked.add(sequence.digest)
                if reason is Blocked.FULL:
                    # While someone waits for a slot, no adapter's sequence may start, or slots might never drain.
                    blocked.update(filter(None, self.waiting.digests()))
                continue
            if sequence.id not in self._by_id:
                continue  # its adapter could not be loaded
            matched = self._match(sequence)
            if self._is_being_computed(sequence, matched):
                self._release(sequence)
                continue
            # The margin keeps a newcomer from being preempted at once by those that run.
            if not self.blocks.can_hold(matched, sequence.length, reserve=len(self.running)):
                self._release(sequence)
                return  # and nobody overtakes it, or a long prompt would wait for ever
            item = self._start(sequence, matched, budget)
            if item is None:
                continue
            batch[sequence] = item
            budget -= item.count
            if budget == 0 or len(self.running) >= self.max_num_seqs:
                return

    def _match(self, sequence: SequenceState) -> list[int]:
        return self.blocks.match(sequence.hashes(self.blocks.block_size, sequence.num_cacheable))

    def _is_being_computed(self, sequence: SequenceState, matched: list[int]) -> bool:
        """Whether most of the base's part of a prompt is being computed for another one, so that waiting saves it.

        Adapters with an invocation come together to one context; each of them would compute it.
        """
        if sequence.adapted_from == 0:
            return False
        size = self.blocks.block_size
        last = min(sequence.adapted_from, sequence.num_cacheable) // size - 1  # block of the base's part
        middle = (len(matched) + last + 1) // 2
        if middle <= len(matched):
            return False  # it saves a block or none
        wanted = sequence.hashes(size, sequence.num_cacheable)[middle]
        return any(
            middle < len(running.block_hashes)
            and running.block_hashes[middle] == wanted
            and running.context < (middle + 1) * size
            for running in self.running
        )

    def _acquire(self, sequence: SequenceState) -> Blocked | None:
        """Give the sequence its adapter's slot; a failed load ends it and all others that wait for the same."""
        if sequence.request.adapter is None:
            return None
        try:
            slot = self.residency.acquire(sequence.request.adapter)
        except TenoraError as error:
            self._fail_waiting(sequence.digest, error)
            return None
        if slot is Blocked.FULL and not any(running.slot >= 0 for running in self.running):
            # Nobody will release a slot: waiting would be for ever.
            message = "The adapter has no room beside the pinned ones; unpin an adapter or enlarge the pool."
            self._fail_waiting(sequence.digest, ConflictError(message, code="adapters_pinned"))
            return None
        if isinstance(slot, Blocked):
            return slot
        sequence.slot = slot
        sequence.adapted_from = adapted_from(sequence.request.token_ids, self.residency.invocation(sequence.digest))
        if self.prefixes is not None:
            self._leave_room(sequence, self.prefixes)
        return None

    def _leave_room(self, sequence: SequenceState, prefixes: Prefixes) -> None:
        """Let a sequence begin after its adapter's virtual tokens; it ends here if it does not fit behind them."""
        try:
            sequence.offset = prefixes.count(sequence.slot)
        except TenoraError as error:
            self._fail(sequence, error)
            return
        if sequence.offset and sequence.length + min(sequence.sampling.max_tokens, 1) > self.max_model_len:
            message = (
                f"The prompt has {sequence.num_prompt} tokens, the adapter puts {sequence.offset} virtual ones before "
                f"it, and the model's context is {self.max_model_len}; shorten the prompt."
            )
            self._fail(sequence, ContextLengthError(message))

    def _fail(self, sequence: SequenceState, error: TenoraError) -> None:
        """End one sequence, with what it holds."""
        self.failed.append((sequence, error))
        if sequence not in self.running:
            self._release(sequence)
        self.finish(sequence)

    def _fail_waiting(self, digest: str, error: TenoraError) -> None:
        for waiting in self.waiting.waiting_for(digest):
            self.failed.append((waiting, error))
            self.finish(waiting)

    def _start(self, sequence: SequenceState, matched: list[int], budget: int) -> Scheduled | None:
        """Let a sequence run; None if its adapter's virtual tokens could not be laid down, which ends it."""
        self.waiting.take(sequence)
        self.running.append(sequence)
        sequence.block_table = self.blocks.take(matched)
        held = len(matched) * self.blocks.block_size
        sequence.num_computed = max(held - sequence.offset, 0)
        if sequence.cached_tokens is None:
            sequence.queue_seconds = time.monotonic() - sequence.arrived
            sequence.cached_tokens = sequence.charged = sequence.num_computed
            self.prefix_queries += sequence.num_prompt
            self.prefix_hits += sequence.num_computed
        count = min(sequence.alike, budget)
        if not self.blocks.grow(sequence.block_table, sequence.context + count):
            raise RuntimeError("blocks vanished between can_hold and grow")
        if self.prefixes is not None and held < sequence.offset:
            try:
                self.prefixes.lay(sequence.slot, held, sequence.block_table)
            except TenoraError as error:
                self._fail(sequence, error)
                return None
            self._register(sequence, held, sequence.offset)
        return Scheduled(sequence, sequence.num_computed, count)

    def _victim(self) -> SequenceState:
        held: Counter[str] = Counter()
        for sequence in self.running:
            held[sequence.request.share_group] += len(sequence.block_table)
        return max(self.running, key=lambda running: (held[running.request.share_group], *running.order))

    def _preempt(self, sequence: SequenceState) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.requeue(sequence)

    def _release(self, sequence: SequenceState) -> None:
        self.blocks.free(sequence.block_table)
        sequence.num_computed = 0
        if sequence.slot >= 0:
            sequence.slot = -1
            self.residency.release(sequence.digest)
