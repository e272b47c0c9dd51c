"""Training's share is of the device's time, also where the host only enqueues. A simulated GPU stands for CUDA's."""

from __future__ import annotations

from typing import cast

import pytest
import torch

from tenora.config import Settings
from tenora.engine import core
from tenora.engine.clock import DeviceClock, HostClock, clock_of
from tenora.engine.trainer import LONGEST_BURST_SECONDS, STEPS_BETWEEN_BURSTS, Trainer
from tenora.model.decoder import Decoder
from tenora.training.fusion import FusedTraining

ENQUEUED = 0.05  # milliseconds of the host for a piece


class Gpu:
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
    def __init__(self, gpu: Gpu) -> None:
        self.gpu, self.at = gpu, -1.0

    def record(self) -> None:
        self.at = max(self.gpu.free, self.gpu.host)

    def synchronize(self) -> None:
        assert self.at >= 0, "nobody has placed it"
        self.gpu.host = max(self.gpu.host, self.at)

    def elapsed_time(self, end: Mark) -> float:
        assert max(self.at, end.at) <= self.gpu.host, "the host asks before the GPU is there"
        return end.at - self.at


class Layers:
    """Training whose every layer takes a GPU some time and the host next to none."""

    busy = True

    def __init__(self, gpu: Gpu, *milliseconds: float) -> None:
        self.gpu, self.milliseconds = gpu, milliseconds
        self.done = 0

    def advance(self) -> None:
        self.gpu.give(self.milliseconds[self.done % len(self.milliseconds)])
        self.done += 1


def trainer(gpu: Gpu, layers: Layers, share: float = 0.5) -> Trainer:
    return Trainer(cast("FusedTraining", layers), share=share, clock=DeviceClock(lambda: Mark(gpu)))


@pytest.mark.parametrize("layers", [(5.0,), (4.0, 6.0), (20.0,), (0.5,)], ids=str)
def test_a_slice_is_as_long_as_it_was_told_on_the_device(layers: tuple[float, ...]) -> None:
    """By the host's time it enqueued a thousand layers, and the next step waited for all of them."""
    gpu = Gpu()
    work = Layers(gpu, *layers)
    trainer(gpu, work).slice(0.1)
    took = sum(layers[number % len(layers)] for number in range(work.done))
    assert 100 - 2 * max(layers) <= took < 100 + max(layers), "the layer that is under way counts"
    assert gpu.free <= gpu.host, "nothing of it is under way when the next step begins"


def test_the_device_is_never_idle_within_a_slice_and_the_host_never_far_ahead() -> None:
    gpu = Gpu()
    work = Layers(gpu, 5.0)
    trainer(gpu, work).slice(0.2)
    assert gpu.free == pytest.approx(5.0 * work.done), "one layer began when the one before it ended"
    assert max(gpu.ahead) < 10.0, "at most two layers"


def test_a_gpu_that_only_trains_is_not_idle_between_two_slices() -> None:
    gpu = Gpu()
    work = Layers(gpu, 5.0)
    engine = trainer(gpu, work)
    for _ in range(20):
        engine.slice(0.02, drain=False)
        gpu.host += 1.0  # commands are looked for, heartbeats sent
    assert gpu.free == pytest.approx(5.0 * work.done), "one layer began when the one before it ended"
    assert max(gpu.ahead) < 15.0, "at most three layers"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_the_share_of_training_holds_with_asynchronous_work(share: float) -> None:
    gpu = Gpu()
    work = Layers(gpu, 3.0)
    engine = trainer(gpu, work, share)
    for _ in range(2000):
        gpu.give(10.0)
        gpu.wait()  # the tokens are read
        engine.beside(0.010)
    trained = 3.0 * work.done
    assert trained / (trained + 2000 * 10.0) == pytest.approx(share, abs=0.02)


def test_what_a_command_cut_off_a_burst_is_made_up_for_by_the_next() -> None:
    gpu = Gpu()
    work, commands = Layers(gpu, 3.0), [False]
    clock = DeviceClock(lambda: Mark(gpu))
    engine = Trainer(cast("FusedTraining", work), commands_wait=lambda: commands[0], clock=clock)
    for number in range(2400):
        commands[0] = number // STEPS_BETWEEN_BURSTS % 2 == 0  # at every other burst
        gpu.give(10.0)
        gpu.wait()
        engine.beside(0.010)
    assert 3.0 * work.done == pytest.approx(2400 * 10.0, rel=0.02)


def test_a_burst_holds_a_step_up_for_no_longer_than_it_owes() -> None:
    gpu = Gpu()
    engine = trainer(gpu, Layers(gpu, 3.0))
    gaps = []
    for _ in range(500):
        before = gpu.host
        engine.beside(0.010)
        gpu.wait()  # as the step does that comes next
        gaps.append(gpu.host - before)
        gpu.give(10.0)
        gpu.wait()
    assert max(gaps) <= 1e3 * LONGEST_BURST_SECONDS + 6.0
    assert sum(gap > 1.0 for gap in gaps) / len(gaps) <= 0.05, "19 of 20 gaps hold no burst"


def test_a_command_ends_a_slice_within_two_layers() -> None:
    gpu = Gpu()
    work = Layers(gpu, 5.0)
    engine = Trainer(
        cast("FusedTraining", work), commands_wait=lambda: gpu.host > 40.0, clock=DeviceClock(lambda: Mark(gpu))
    )
    engine.slice(10.0)
    assert gpu.host <= 40.0 + 3 * 5.0


def test_a_cpu_has_the_hosts_clock() -> None:
    assert isinstance(clock_of(torch.device("cpu")), HostClock)


def test_a_gpu_has_a_clock_of_its_events(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[dict[str, bool]] = []

    def event(**how: bool) -> Mark:
        made.append(how)
        return Mark(Gpu())

    monkeypatch.setattr(torch.cuda, "Event", event)
    assert isinstance(clock_of(torch.device("cuda")), DeviceClock)
    assert made == [{"enable_timing": True}]


def test_the_engines_training_has_the_clock_of_its_device(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = HostClock()
    monkeypatch.setattr(core, "clock_of", lambda device: clock if device == decoder.device else None)
    engine = core.Engine(decoder, Settings(kv_cache_bytes=2**20, adapter_pool_bytes=2**20, max_adapters=2))
    assert engine.trainer._clock is clock


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_slice_of_matrix_products_is_as_long_as_it_was_told() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)

    class Products:
        busy, done = True, 0

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
