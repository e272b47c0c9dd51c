"""The quick order of the waiting sequences is the plain one's."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from random import Random
from types import FrameType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tenora.engine import fairness
from tenora.engine.blocks import BlockManager
from tenora.engine.fairness import FairQueue
from tenora.engine.messages import Generate
from tenora.engine.scheduler import Scheduler
from tenora.engine.sequence import SequenceState
from tests.engine.requests import generate, ref, sampling, sequence
from tests.engine.slow_scheduler import SlowScheduler
from tests.engine.test_scheduler import Slots, step

DIGESTS = tuple("01234567")


class Pair:
    """The scheduler and its specification, told the same."""

    def __init__(self, kinds: tuple[type[Scheduler], ...], *, blocks: int, seqs: int, tokens: int, slots: int) -> None:
        self.slots = [Slots(slots, loaded=False) for _ in kinds]
        self.both = [
            kind(BlockManager(blocks, 4), slots, max_num_seqs=seqs, max_num_batched_tokens=tokens)
            for kind, slots in zip(kinds, self.slots, strict=True)
        ]
        self.arrivals = 0

    def join(self, request: Generate) -> None:
        for scheduler in self.both:
            scheduler.add(SequenceState.start(request, self.arrivals))
        self.arrivals += 1

    def abort(self, choice: Random) -> None:
        if live := sorted(sequence.id for sequence in self.both[0].live()):
            chosen = choice.choice(live)
            for scheduler in self.both:
                gone = scheduler.get(chosen)
                assert gone is not None
                scheduler.finish(gone)

    def step(self) -> None:
        quick, slow = (
            (
                [found.digest for found in scheduler.upcoming_adapters()],
                [(item.sequence.id, item.start, item.count) for item in step(scheduler)],
                Counter(failed.id for failed, _ in scheduler.failed),
                scheduler.preemptions,
                sorted(waiting.id for waiting in scheduler.waiting),
            )
            for scheduler in self.both
        )
        assert quick == slow


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    choice=st.randoms(use_true_random=False),
    blocks=st.integers(10, 40),
    seqs=st.integers(1, 8),
    tokens=st.integers(2, 24),
    slots=st.integers(0, 5),
    groups=st.integers(1, 12),
)
def test_who_runs_next_is_what_the_plain_scheduler_says(
    choice: Random, blocks: int, seqs: int, tokens: int, slots: int, groups: int
) -> None:
    pair = Pair((Scheduler, SlowScheduler), blocks=blocks, seqs=seqs, tokens=tokens, slots=slots)

    def join() -> None:
        for _ in range(choice.randint(1, 6)):
            digest = choice.choice((None, *DIGESTS))
            request = generate(
                [choice.randrange(2) for _ in range(choice.randint(1, 20))],
                sampling(max_tokens=choice.randint(1, 8)),
                adapter=None if digest is None else ref(digest),
                share_group=f"group-{choice.randrange(groups)}",
                priority=choice.randint(-1, 1),
                weight=choice.choice((0.5, 1.0, 3.0)),
            )
            pair.join(request)

    def change(mend: bool) -> None:
        digest = choice.choice(DIGESTS)
        for each in pair.slots:
            assert each.loaded is not None
            each.loaded.add(digest)
            if mend:
                each.broken.discard(digest)
            elif digest not in +each.references:
                each.broken.add(digest)

    actions: tuple[Callable[[], None], ...] = (
        join,
        join,
        pair.step,
        pair.step,
        pair.step,
        lambda: pair.abort(choice),
        lambda: change(mend=True),
        lambda: change(mend=True),
        lambda: change(mend=False),
    )
    for _ in range(60):
        choice.choice(actions)()
    for each in pair.slots:
        each.loaded = set(DIGESTS)
    for _ in range(2000):
        if not pair.both[0].live():
            break
        pair.step()
    assert [scheduler.live() for scheduler in pair.both] == [[], []]


def calls(work: Callable[[], object]) -> int:
    """Calls of Python functions, a measure of work that no other program disturbs."""
    made = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal made
        made += event == "call"

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(before)
    return made


@pytest.mark.parametrize("groups", [1, 64, 1024])
def test_planning_a_step_costs_little_for_each_who_waits(groups: int) -> None:
    """Every slot is taken, and 1,024 wait for one. Looking through the groups for each of them took 500,000 calls."""
    scheduler = Scheduler(BlockManager(4096, 4), Slots(size=8), max_num_seqs=16, max_num_batched_tokens=512)
    for number in range(8 + 1024):
        scheduler.add(
            sequence([1], sampling(max_tokens=50), adapter=ref(str(number)), share_group=f"group-{number % groups}")
        )
    for _ in range(2):
        assert calls(lambda: step(scheduler)) < 2000
    assert len(scheduler.running) == 8
    assert calls(lambda: list(scheduler.upcoming_adapters())) < 500
    waits = list(scheduler.waiting)[500]
    assert calls(lambda: scheduler.finish(waits)) < 100


def test_a_base_sequence_runs_though_every_slot_is_waited_for() -> None:
    scheduler = Scheduler(BlockManager(4096, 4), Slots(size=1), max_num_seqs=8, max_num_batched_tokens=512)
    for number in range(300):
        scheduler.add(sequence([1], adapter=ref(str(number)), share_group=f"group-{number}"))
    base = sequence([1], share_group="last")
    scheduler.add(base)
    assert base in [item.sequence for item in step(scheduler)]


def test_groups_that_have_left_are_forgotten_but_for_those_with_a_debt() -> None:
    queue = FairQueue()
    stays = sequence([1], share_group="stays")
    queue.enter(stays)
    queue.charge(stays, 10)
    for number in range(5 * fairness._FEWEST_KEPT):
        passing = sequence([1], share_group=f"group-{number}")
        queue.enter(passing)
        if number == 7:
            queue.charge(passing, 1000)
        queue.take(passing)
        queue.leave(passing)
    assert len(queue._share_groups) <= 2 * fairness._FEWEST_KEPT
    back, fresh = sequence([1], share_group="group-7"), sequence([1], share_group="fresh")
    queue.enter(back)
    queue.enter(fresh)
    assert list(queue.candidates()) == [stays, fresh, back]
