"""A device that failed for good ends the engine's process; one that only stumbled does not. A probe stands for CUDA."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine import process
from tenora.engine.client.client import AsyncEngine
from tenora.engine.core import Engine
from tenora.engine.messages import Command, Event
from tenora.errors import DeviceLostError, UnavailableError
from tenora.model import device
from tenora.model.decoder import Decoder
from tenora.training.events import FailedEvent, FinishedEvent
from tenora.training.fusion import FusedTraining
from tenora.training.spec import TrainSpec
from tests.engine.driver import Driver, MakeDriver
from tests.engine.requests import generate, sampling
from tests.support.errors import OUT_OF_MEMORY
from tests.support.patience import PATIENCE
from tests.support.scripted_engine import READY
from tests.training.runs import default_spec, write_rows

ILLEGAL = RuntimeError("CUDA error: an illegal memory access was encountered")


class Gpu:
    """The probe of a device: it raises once it is dead, as every call of a lost CUDA context does."""

    def __init__(self) -> None:
        self.dead = False
        self.asked = 0

    def __call__(self, _: torch.device) -> None:
        self.asked += 1
        if self.dead:
            raise ILLEGAL


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Makes the CPU a device that can be lost."""
    found = Gpu()
    monkeypatch.setitem(device.PROBES, "cpu", found)
    return found


def breaks(error: Exception) -> Callable[..., Any]:
    def broken(*_: Any, **__: Any) -> Any:
        raise error

    return broken


def steps(tiny: Driver) -> None:
    for _ in range(50):
        tiny.step()


@pytest.fixture
def spec(tmp_path: Path) -> TrainSpec:
    write_rows(tmp_path)
    return default_spec(tmp_path, "run")


def test_a_failed_step_is_survived_as_long_as_the_device_works_and_ends_the_engine_when_it_does_not(
    driver: MakeDriver, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = driver()
    with monkeypatch.context() as once:
        once.setattr(tiny.engine.runner, "run", breaks(ILLEGAL))
        (answer,) = tiny.run(generate([5]))
    assert answer.failure is not None
    assert answer.failure.code == "engine_error"
    assert gpu.asked == 1
    (good,) = tiny.run(generate([5]))
    assert good.failure is None, "the engine goes on"

    gpu.dead = True
    monkeypatch.setattr(tiny.engine.runner, "run", breaks(ILLEGAL))
    tiny.add(generate([6]))
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        tiny.step()


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
def test_an_error_that_reads_like_memory_does_not_hide_a_lost_device(
    error: Exception, driver: MakeDriver, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = driver()
    monkeypatch.setattr(tiny.engine.runner, "run", breaks(error))
    (answer,) = tiny.run(generate([5]))
    assert answer.failure is not None
    assert answer.failure.code == "out_of_memory"
    gpu.dead = True
    tiny.add(generate([6]))
    with pytest.raises(DeviceLostError):
        tiny.step()


def test_an_adapter_that_cannot_be_placed_on_a_lost_device_ends_the_engine(
    driver: MakeDriver, gpu: Gpu, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = driver()
    with monkeypatch.context() as once:
        once.setattr(tiny.engine.pool, "insert", breaks(ILLEGAL))
        (answer,) = tiny.run(generate([5], adapter=adapters[0]))
    assert answer.failure is not None
    assert answer.failure.code == "adapter_unavailable"
    assert tiny.run(generate([5], adapter=adapters[0]))[0].failure is None
    gpu.dead = True
    monkeypatch.setattr(tiny.engine.pool, "insert", breaks(ILLEGAL))
    tiny.add(generate([5], adapter=adapters[1]))
    with pytest.raises(DeviceLostError):
        steps(tiny)


def test_an_adapter_that_cannot_be_pinned_in_host_memory_ends_the_engine_if_its_device_is_lost(
    driver: MakeDriver, gpu: Gpu, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = driver()
    monkeypatch.setattr(tiny.engine.loader, "_read", breaks(ILLEGAL))
    gpu.dead = True
    tiny.add(generate([5], adapter=adapters[0]))
    with pytest.raises(DeviceLostError):
        steps(tiny)


@pytest.mark.parametrize("call", ["acquire", "settle"])
def test_an_adapter_that_does_not_arrive_on_a_lost_device_ends_the_engine(
    call: str, driver: MakeDriver, gpu: Gpu, adapters: list[AdapterRef], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether somebody waits for it, or it is only taken in."""
    tiny = driver()
    with monkeypatch.context() as once:
        once.setattr(tiny.engine.pool, call, breaks(ILLEGAL))
        if call == "acquire":
            (answer,) = tiny.run(generate([5], adapter=adapters[0]))
            assert answer.failure is not None
            assert answer.failure.code == "adapter_unavailable"
        else:
            tiny.step()
    assert gpu.asked > 0
    gpu.dead = True
    monkeypatch.setattr(tiny.engine.pool, call, breaks(ILLEGAL))
    tiny.add(generate([5], adapter=adapters[1]))
    with pytest.raises(DeviceLostError):
        steps(tiny)


def test_training_survives_a_failed_pass_and_not_a_lost_device(
    decoder: Decoder, spec: TrainSpec, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = FusedTraining(decoder)
    training.start(spec)
    with monkeypatch.context() as once:
        once.setattr(FusedTraining, "_run", breaks(ILLEGAL))
        events = [event for event in training if event is not None]
    assert isinstance(events[-1], FailedEvent)
    assert gpu.asked > 0
    training.start(spec)
    assert isinstance([event for event in training if event is not None][-1], FinishedEvent)

    gpu.dead = True
    monkeypatch.setattr(FusedTraining, "_run", breaks(ILLEGAL))
    training.start(default_spec(Path(spec.workdir).parent, "other"))
    with pytest.raises(DeviceLostError):
        list(training)


def test_a_run_that_reads_from_a_lost_device_does_not_end_as_a_failed_job(
    decoder: Decoder, spec: TrainSpec, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels fail when their results are read: in the run's own code, as an error of the run, it seems."""
    gpu.dead = True
    monkeypatch.setattr("tenora.training.learner.clip_grad_norm", breaks(ILLEGAL))
    training = FusedTraining(decoder)
    training.start(spec)
    with pytest.raises(DeviceLostError):
        list(training)


class _Channel:
    """A line that nothing comes in on."""

    def __init__(self) -> None:
        self.sent: list[Event] = []

    def receive(self, timeout: float) -> list[Command]:
        return []

    def send(self, client: bytes, event: Event) -> None:
        self.sent.append(event)

    def wake(self) -> None: ...

    def waits(self) -> bool:
        return False


def test_the_process_of_a_lost_device_ends_with_a_status_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost:
        ready = READY
        has_work = True
        step = staticmethod(breaks(DeviceLostError("cuda:0 is lost")))

    monkeypatch.setattr(Engine, "load", lambda *_, **__: Lost())
    channel: Any = _Channel()
    assert process.serve(Settings(), tmp_path, channel, os.getppid()) == process.DEVICE_LOST != 0


HELD_UP = """
import sys, threading
from tenora.engine import process
process.serve = lambda *_: process.DEVICE_LOST
threading.Thread(target=threading.Event().wait).start()  # as one that waits for the dead device
sys.exit(process.main())
"""


def test_nothing_that_waits_for_the_lost_device_holds_its_process_up(tmp_path: Path) -> None:
    launch = {"settings": {}, "model_dir": "", "address": f"ipc://{tmp_path}/e", "door": None, "parent": os.getpid()}
    command = [sys.executable, "-c", HELD_UP]
    done = subprocess.run(command, input=json.dumps(launch).encode(), timeout=PATIENCE, check=False)
    assert done.returncode == process.DEVICE_LOST


async def test_everybody_gets_an_error_and_the_next_engine_answers(
    decoder: Decoder, gpu: Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the API's side: what was open ends with a 503 that says to retry, and the retry is answered."""
    settings = Settings(device="cpu", kv_cache_bytes=2**20, adapter_pool_bytes=2**20, max_adapters=4)
    built: list[Engine] = []

    def build(wake: Callable[[], None]) -> Engine:
        gpu.dead = False  # a new process has a new context
        built.append(Engine(decoder, settings, wake=wake))
        return built[-1]

    engine = AsyncEngine.in_thread(settings, build)
    await engine.start()
    try:
        gpu.dead = True
        monkeypatch.setattr(built[0].runner, "run", breaks(ILLEGAL))
        requests = [generate([5, 6, seed], sampling(max_tokens=4)) for seed in range(3)]

        async def tokens(request: Any) -> list[int]:
            return [token async for output in engine.generate(request) for token in output.token_ids]

        lost = await asyncio.gather(*(tokens(request) for request in requests), return_exceptions=True)
        assert all(isinstance(error, UnavailableError) and error.code == "engine_lost" for error in lost), lost
        await engine.wait_alive()
        assert engine.restarts == 1
        assert len(await tokens(generate([5, 6, 7], sampling(max_tokens=4)))) == 4
    finally:
        await engine.close(1)
