from __future__ import annotations

from collections import Counter
from random import Random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tenora.adapters.ref import AdapterRef
from tenora.engine.blocks import BlockManager
from tenora.engine.scheduler import LOOK_AHEAD, Blocked, Scheduled, Scheduler
from tenora.engine.sequence import SequenceState
from tenora.errors import UnavailableError
from tests.engine.requests import ref, sampling, sequence


class Slots:
    """A residency without weights: `size` slots, adapters load when the test says so."""

    def __init__(self, size: int = 64, *, loaded: bool = True) -> None:
        self.size = size
        self.loaded: set[str] | None = None if loaded else set()
        self.broken: set[str] = set()
        self.references: Counter[str] = Counter()

    def acquire(self, adapter: AdapterRef) -> int | Blocked:
        if adapter.digest in self.broken:
            raise UnavailableError("broken", code="adapter_unavailable")
        if self.loaded is not None and adapter.digest not in self.loaded:
            return Blocked.LOADING
        if adapter.digest not in +self.references and len(+self.references) >= self.size:
            return Blocked.FULL
        self.references[adapter.digest] += 1
        return int(adapter.digest)

    def invocation(self, digest: str) -> tuple[int, ...]:  # the protocol's
        return ()

    def release(self, digest: str) -> None:
        assert self.references[digest] > 0
        self.references[digest] -= 1


def make(
    num_blocks: int = 64, block_size: int = 4, seqs: int = 8, tokens: int = 16, slots: Slots | None = None
) -> Scheduler:
    blocks = BlockManager(num_blocks, block_size)
    return Scheduler(blocks, slots or Slots(), max_num_seqs=seqs, max_num_batched_tokens=tokens)


def step(scheduler: Scheduler) -> list[Scheduled]:
    """Schedule and pretend that the model ran: every sampled token is 7."""
    batch = scheduler.schedule()
    for item in batch:
        scheduler.computed(item)
        if item.samples:
            item.sequence.token_ids.append(7)
            if item.sequence.num_output >= item.sequence.sampling.max_tokens:
                scheduler.finish(item.sequence)
    return batch


def shape(batch: list[Scheduled]) -> list[tuple[SequenceState, int, int]]:
    return [(item.sequence, item.start, item.count) for item in batch]


def test_a_long_prompt_is_computed_in_chunks_beside_decodes() -> None:
    scheduler = make(tokens=8)
    decoding, long = sequence([1, 2]), sequence(range(20))
    scheduler.add(decoding)
    step(scheduler)
    scheduler.add(long)
    assert shape(step(scheduler)) == [(decoding, 2, 1), (long, 0, 7)]
    assert shape(step(scheduler)) == [(decoding, 3, 1), (long, 7, 7)]
    assert shape(step(scheduler)) == [(decoding, 4, 1), (long, 14, 6)]
    assert long.num_output == 1


def test_every_decode_fits_into_every_step() -> None:
    scheduler = make(seqs=32, tokens=4)
    for _ in range(6):
        scheduler.add(sequence([1, 2], sampling(max_tokens=50)))
    for _ in range(8):
        step(scheduler)
    assert len(scheduler.running) == 4
    assert [item.count for item in step(scheduler)] == [1, 1, 1, 1]


def test_groups_share_what_is_admitted_by_weight() -> None:
    scheduler = make(num_blocks=512, seqs=1, tokens=16)
    for _ in range(60):
        scheduler.add(sequence(range(8), sampling(max_tokens=1), share_group="noisy"))
    for _ in range(30):
        scheduler.add(sequence(range(8), sampling(max_tokens=1), share_group="quiet"))
        scheduler.add(sequence(range(100, 108), sampling(max_tokens=1), share_group="heavy", weight=2.0))
    served: Counter[str] = Counter()
    for _ in range(40):
        for item in step(scheduler):
            served[item.sequence.request.share_group] += item.count
    # Cached prompts cost their uncached tokens only, so count what was computed.
    assert served["noisy"] == pytest.approx(served["quiet"], rel=0.15)
    assert served["heavy"] == pytest.approx(2 * served["quiet"], rel=0.15)


def test_a_newcomer_group_does_not_wait_for_a_backlog() -> None:
    scheduler = make(num_blocks=512, seqs=1)
    for _ in range(50):
        scheduler.add(sequence(range(8), sampling(max_tokens=1), share_group="noisy"))
    for _ in range(10):
        step(scheduler)
    late = sequence(range(8), sampling(max_tokens=1), share_group="late")
    scheduler.add(late)
    ran = [item.sequence for _ in range(2) for item in step(scheduler)]
    assert late in ran


def test_priority_orders_within_a_group() -> None:
    scheduler = make(seqs=1)
    first, urgent = sequence([1], sampling(max_tokens=1)), sequence([2], sampling(max_tokens=1), priority=-1)
    scheduler.add(first)
    scheduler.add(urgent)
    assert [item.sequence for item in step(scheduler)] == [urgent]


def test_preemption_takes_the_newest_of_the_largest_group_and_recomputes_it() -> None:
    scheduler = make(num_blocks=6, block_size=2, tokens=32)
    old = sequence([1, 2, 3], sampling(max_tokens=6), share_group="a")
    new = sequence([4, 5, 6], sampling(max_tokens=6), share_group="b")
    scheduler.add(old)
    scheduler.add(new)
    while old.num_output < 6 or new.num_output < 6:
        assert step(scheduler)
        scheduler.check_integrity()
    assert scheduler.preemptions > 0
    assert scheduler.blocks.num_used == 0
    assert old.token_ids == [1, 2, 3, *[7] * 6]
    assert new.token_ids == [4, 5, 6, *[7] * 6]


def test_a_preempted_sequence_finds_its_own_blocks_again() -> None:
    scheduler = make(num_blocks=8, block_size=2)
    item = sequence(range(6), sampling(max_tokens=4))
    scheduler.add(item)
    step(scheduler)
    step(scheduler)
    scheduler._preempt(item)
    scheduler.check_integrity()
    (again,) = step(scheduler)
    assert (again.start, again.count) == (6, 2)  # 3 full blocks were computed, the last token was not


def test_the_last_prompt_token_is_always_computed() -> None:
    scheduler = make(block_size=4)
    for _ in range(2):
        scheduler.add(sequence(range(8), sampling(max_tokens=1)))
        (item,) = step(scheduler)
    assert (item.start, item.count) == (4, 4)
    assert item.sequence.cached_tokens == 4
    assert scheduler.prefix_queries == 16
    assert scheduler.prefix_hits == 4


@pytest.mark.parametrize(("first", "start"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (12, 8), (99, 8)])
def test_of_a_scored_prompt_the_cache_stands_for_what_no_score_needs(first: int, start: int) -> None:
    scheduler = make(block_size=4)
    scheduler.add(sequence(range(12), sampling(max_tokens=1)))
    step(scheduler)
    scheduler.add(sequence(range(12), sampling(max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=first)))
    (item,) = step(scheduler)
    assert (item.start, item.count) == (start, 12 - start)


def test_a_sequence_whose_adapter_loads_does_not_hold_up_the_others() -> None:
    slots = Slots(loaded=False)
    scheduler = make(slots=slots)
    waits, base = sequence([1], adapter=ref("0")), sequence([2])
    scheduler.add(waits)
    scheduler.add(base)
    assert [item.sequence for item in step(scheduler)] == [base]
    slots.loaded = {"0"}
    assert waits in [item.sequence for item in step(scheduler)]
    assert waits.slot == 0


def test_a_sequence_whose_adapter_loads_keeps_no_blocks_from_the_others() -> None:
    """It could not run yet, so that too few blocks are free for it is no reason to wait for it."""
    slots = Slots(loaded=False)
    scheduler = make(num_blocks=8, block_size=4, slots=slots)
    running = sequence(range(12), sampling(max_tokens=8))
    scheduler.add(running)
    step(scheduler)
    long, short = sequence(range(100, 120), adapter=ref("0")), sequence([1], sampling(max_tokens=1))
    scheduler.add(long)
    scheduler.add(short)
    assert short in [item.sequence for item in step(scheduler)]
    slots.loaded = {"0"}
    scheduler.add(sequence([2], sampling(max_tokens=1)))
    assert [item.sequence for item in step(scheduler)] == [running], "now it is its turn, and nobody overtakes it"
    assert slots.references["0"] == 0, "what waits for blocks holds no slot"
    while not long.num_output:
        assert step(scheduler)


def test_the_adapters_of_who_waits_are_named_in_the_order_of_admission() -> None:
    scheduler = make(seqs=1)
    scheduler.add(sequence([1], sampling(max_tokens=50), share_group="a"))
    step(scheduler)
    assert list(scheduler.upcoming_adapters()) == []
    for digest in "5", "3", "5":
        scheduler.add(sequence([1], adapter=ref(digest), share_group="a"))
    scheduler.add(sequence([1], share_group="b"))
    scheduler.add(sequence([1], adapter=ref("7"), share_group="b"))
    for _ in range(3):
        step(scheduler)
    assert list(scheduler.upcoming_adapters()) == [ref("7"), ref("5"), ref("3")]
    for number in range(10, 100):
        scheduler.add(sequence([1], adapter=ref(str(number)), share_group="b"))
    assert len(list(scheduler.upcoming_adapters())) == LOOK_AHEAD - 1  # one of them has no adapter


def test_slots_drain_for_the_adapter_that_waits() -> None:
    scheduler = make(slots=Slots(size=1))
    first = sequence([1], sampling(max_tokens=3), adapter=ref("0"))
    scheduler.add(first)
    step(scheduler)
    second = sequence([2], adapter=ref("1"))
    scheduler.add(second)
    overtaker = sequence([3], adapter=ref("0"))
    scheduler.add(overtaker)
    base = sequence([4])
    scheduler.add(base)
    assert {item.sequence for item in step(scheduler)} == {first, base}
    step(scheduler)  # first ends here
    assert second in [item.sequence for item in step(scheduler)]
    assert overtaker not in scheduler.running


def test_a_failed_load_ends_all_that_wait_for_it_and_nothing_else() -> None:
    slots = Slots()
    slots.broken = {"1"}
    scheduler = make(slots=slots)
    bad = [sequence([1], adapter=ref("1"), share_group=name) for name in ("a", "a", "b")]
    good = [sequence([2], adapter=ref("2")), sequence([3])]
    for item in (*bad, *good):
        scheduler.add(item)
    assert [item.sequence for item in scheduler.schedule()] == good
    assert {item for item, _ in scheduler.failed} == set(bad)
    assert scheduler.get(bad[0].id) is None
    assert set(scheduler.adapter_use) == {"2", ""}


def test_when_all_slots_are_pinned_a_sequence_is_told_so() -> None:
    scheduler = make(slots=Slots(size=0))
    waits = sequence([1], adapter=ref("0"))
    scheduler.add(waits)
    assert scheduler.schedule() == []
    ((failed, error),) = scheduler.failed
    assert failed is waits
    assert "pinned" in error.message


class Traffic(RuleBasedStateMachine):
    """Random joins, steps, aborts and adapter trouble; the books must balance and everybody must end."""

    @initialize(
        num_blocks=st.integers(6, 20), block_size=st.integers(1, 4), tokens=st.integers(1, 16), seqs=st.integers(1, 6)
    )
    def start(self, num_blocks: int, block_size: int, tokens: int, seqs: int) -> None:
        self.slots = Slots(size=2, loaded=False)
        self.scheduler = make(num_blocks, block_size, seqs, tokens, self.slots)
        self.capacity = num_blocks * block_size
        self.ended: list[SequenceState] = []

    @rule(
        prompt=st.lists(st.integers(0, 2), min_size=1, max_size=30),
        max_tokens=st.integers(1, 12),
        adapter=st.sampled_from([None, "0", "1", "2"]),
        share_group=st.sampled_from("ab"),
        priority=st.integers(-1, 1),
    )
    def join(self, prompt: list[int], max_tokens: int, adapter: str | None, share_group: str, priority: int) -> None:
        prompt = prompt[: self.capacity - 1]
        params = sampling(max_tokens=min(max_tokens, self.capacity - len(prompt)))
        adapter_ref = None if adapter is None else ref(adapter)
        self.scheduler.add(sequence(prompt, params, adapter=adapter_ref, share_group=share_group, priority=priority))

    @rule(digest=st.sampled_from("012"))
    def load(self, digest: str) -> None:
        assert self.slots.loaded is not None
        self.slots.loaded.add(digest)

    @rule(digest=st.sampled_from("012"))
    def break_adapter(self, digest: str) -> None:
        if digest not in +self.slots.references:
            self.slots.broken.add(digest)

    @rule(digest=st.sampled_from("012"))
    def repair_adapter(self, digest: str) -> None:
        self.slots.broken.discard(digest)

    @rule()
    def run(self) -> None:
        batch = step(self.scheduler)
        assert sum(item.count for item in batch) <= self.scheduler.max_num_batched_tokens
        assert len({item.sequence for item in batch}) == len(batch)
        for item in batch:
            assert item.count > 0
            assert item.start + item.count <= len(item.sequence.token_ids)

    @precondition(lambda self: self.scheduler.live())
    @rule(choice=st.randoms(use_true_random=False))
    def abort(self, choice: Random) -> None:
        self.scheduler.finish(choice.choice(self.scheduler.live()))

    @rule()
    def drain(self) -> None:
        """Whatever happened, the rest runs to its end."""
        self.slots.loaded = {"0", "1", "2"}
        for _ in range(3000):
            if not self.scheduler.live():
                break
            step(self.scheduler)
        assert not self.scheduler.live()
        assert self.scheduler.blocks.num_used == 0
        assert not +self.slots.references
        assert not self.scheduler.adapter_use

    @invariant()
    def books_balance(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.check_integrity()
        running = Counter(s.digest for s in self.scheduler.running if s.digest)
        assert running == +self.slots.references
        live = self.scheduler.live()
        assert len(live) == len(self.scheduler.running) + len(self.scheduler.waiting)
        assert Counter(s.digest for s in live) == self.scheduler.adapter_use


Traffic.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTraffic = Traffic.TestCase
