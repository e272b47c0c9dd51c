"""Training's share is of the device's time, also where the host only enqueues. A simulated card stands for CUDA's."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from tenora.engine.clock import DeviceClock, HostClock, clock_of
from tenora.engine.trainer import LONGEST_BURST_SECONDS, Trainer
from tenora.training.fusion import FusedTraining

ENQUEUED = 0.05  # milliseconds of the host for a piece


class Card:
    """Works through what it was given, in order, while the host goes on. Milliseconds since its start."""

    def __init__(self) -> None:
        self.host, self.free = 0.0, 0.0
        self.ahead: list[float] = []

    def give(self, milliseconds: float) -> None:
        self.free = max(self.free, self.host) + milliseconds
        self.host += ENQUEUED
        self.ahead.append(self.free - self.host)

    def wait(self) -> None:
        self.host = max(self.host, self.free)


class Mark:
    def __init__(self, card: Card) -> None:
        self.card, self.at = card, -1.0

    def record(self) -> None:
        self.at = max(self.card.free, self.card.host)

    def synchronize(self) -> None:
        assert self.at >= 0, "nobody has placed it"
        self.card.host = max(self.card.host, self.at)

    def elapsed_time(self, end: Mark) -> float:
        assert max(self.at, end.at) <= self.card.host, "the host asks before the card is there"
        return end.at - self.at


class Layers:
    """Training whose every layer takes a card some time and the host next to none."""

    active = 1

    def __init__(self, card: Card, *milliseconds: float) -> None:
        self.card, self.milliseconds = card, milliseconds
        self.done = 0

    def advance(self) -> None:
        self.card.give(self.milliseconds[self.done % len(self.milliseconds)])
        self.done += 1


def trainer(card: Card, layers: Layers, share: float = 0.5) -> Trainer:
    return Trainer(cast("FusedTraining", layers), share=share, clock=DeviceClock(lambda: Mark(card)))


@pytest.mark.parametrize("layers", [(5.0,), (4.0, 6.0), (20.0,), (0.5,)], ids=str)
def test_a_slice_is_as_long_as_it_was_told_on_the_device(layers: tuple[float, ...]) -> None:
    """By the host's time it enqueued a thousand layers, and the next step waited for all of them."""
    card = Card()
    work = Layers(card, *layers)
    trainer(card, work).slice(0.1)
    took = sum(layers[number % len(layers)] for number in range(work.done))
    assert 100 - 2 * max(layers) <= took <= 100 + 2 * max(layers)
    assert card.free <= card.host, "nothing of it is under way when the next step begins"


def test_the_device_is_never_idle_within_a_slice_and_the_host_never_far_ahead() -> None:
    card = Card()
    work = Layers(card, 5.0)
    trainer(card, work).slice(0.2)
    assert card.free == pytest.approx(5.0 * work.done), "one layer began when the one before it ended"
    assert max(card.ahead) < 10.0, "at most two layers"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_share_of_training_holds_with_asynchronous_work(share: float) -> None:
    card = Card()
    work = Layers(card, 3.0)
    engine = trainer(card, work, share)
    for _ in range(2000):
        card.give(10.0)
        card.wait()  # the tokens are read
        engine.beside(0.010)
    trained = 3.0 * work.done
    assert trained / (trained + 2000 * 10.0) == pytest.approx(share, abs=0.02)


def test_a_burst_holds_a_step_up_for_no_longer_than_it_owes() -> None:
    card = Card()
    engine = trainer(card, Layers(card, 3.0))
    gaps = []
    for _ in range(500):
        before = card.host
        engine.beside(0.010)
        card.wait()  # as the step does that comes next
        gaps.append(card.host - before)
        card.give(10.0)
        card.wait()
    assert max(gaps) <= 1e3 * LONGEST_BURST_SECONDS + 6.0
    assert sum(gap > 1.0 for gap in gaps) / len(gaps) <= 0.05, "19 of 20 gaps hold no burst"


def test_a_command_ends_a_slice_within_two_layers() -> None:
    card = Card()
    work = Layers(card, 5.0)
    engine = Trainer(
        cast("FusedTraining", work), commands_wait=lambda: card.host > 40.0, clock=DeviceClock(lambda: Mark(card))
    )
    engine.slice(10.0)
    assert card.host <= 40.0 + 3 * 5.0


def test_a_cpu_has_the_hosts_clock() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_card_a_slice_of_matrix_products_is_as_long_as_it_was_told() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    class Products:
        active, done = 1, 0

        def advance(self) -> None:
            self.done += 1
            for _ in range(4):
                matrix @ matrix

    work = Products()
    engine = Trainer(cast("FusedTraining", work), clock=clock_of(device))
    engine.slice(0.05)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    done = work.done
    engine.slice(0.2)
    end.record()
    end.synchronize()
    assert work.done > done
    assert 150 < start.elapsed_time(end) < 300
