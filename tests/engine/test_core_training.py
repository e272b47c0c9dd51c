"""Training beside inference in one engine, stepped by hand."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, cast

from tenora.engine.messages import (
    Outputs,
    SequenceFailed,
    StartTraining,
    StopTraining,
    Training,
)
from tenora.engine.trainer import STEPS_BETWEEN_BURSTS, Trainer
from tenora.model.decoder import Decoder
from tenora.training.events import FailedEvent, StepEvent, StoppedEvent, TrainEvent
from tenora.training.fusion import FusedTraining
from tenora.training.spec import TrainSpec
from tests.engine.driver import MakeDriver
from tests.engine.requests import generate, prompt, sampling
from tests.support.scripted_runs import step_event


class FakeRun:
    """A training run of `steps` optimizer steps, each of three items."""

    def __init__(self, spec: TrainSpec, log: list[str], steps: int = 3) -> None:
        self.spec, self.log, self.steps = spec, log, steps
        self.stopped: bool | None = None

    def stop(self, *, pause: bool) -> None:
        self.stopped = pause

    def __iter__(self) -> Iterator[TrainEvent | None]:
        for step in range(1, self.steps + 1):
            for _ in range(3):
                self.log.append(self.spec.run_id)
                yield None
                if self.stopped is not None:
                    yield StoppedEvent(run_id=self.spec.run_id, step=step, paused=self.stopped)
                    return
            if self.spec.run_id == "bad":
                raise ValueError("diverged")
            yield step_event(self.spec.run_id, step)
        yield StoppedEvent(run_id=self.spec.run_id, step=self.steps, paused=False)


def spec(run_id: str) -> TrainSpec:
    return TrainSpec(run_id=run_id, share_group="", tasks=(), workdir="", base_model="")


class TestTraining:
    def test_runs_take_turns_and_a_failing_one_harms_nobody(self, driver: MakeDriver) -> None:
        log: list[str] = []
        tiny = driver(start_run=lambda _, spec: FakeRun(spec, log))
        for run_id in ("a", "bad", "b"):
            tiny.engine.add(StartTraining(spec(run_id)))
        while tiny.engine.has_work:
            tiny.step()
        assert sorted(log[:3]) == ["a", "b", "bad"]
        ends = {event.run_id: event for event in tiny.training if not isinstance(event, StepEvent)}
        assert isinstance(ends["bad"], FailedEvent)
        assert "diverged" in ends["bad"].message
        assert isinstance(ends["a"], StoppedEvent)
        assert [event.step for event in tiny.training if isinstance(event, StepEvent) and event.run_id == "b"] == [
            1,
            2,
            3,
        ]

    def test_a_run_that_cannot_start_says_why(self, driver: MakeDriver) -> None:
        def start(_: Decoder, spec: TrainSpec) -> Any:
            raise OSError("no such file")

        tiny = driver(start_run=start)
        tiny.engine.add(StartTraining(spec("a")))
        tiny.step()
        assert isinstance(tiny.training[0], FailedEvent)

    def test_training_has_bursts_between_decode_steps(self, driver: MakeDriver) -> None:
        log: list[str] = []
        tiny = driver(start_run=lambda _, spec: FakeRun(spec, log, steps=10**7))
        tiny.engine.add(StartTraining(spec("a")))
        answer = tiny.add(generate(prompt(5), sampling(max_tokens=100)))
        trained = []
        while not answer.done:
            tiny.step()
            trained.append(len(log))
        assert len(trained) == 100  # a token with every step
        bursts = [step for step, (before, after) in enumerate(pairwise(trained)) if after > before]
        assert len(bursts) == 4
        assert {later - earlier for earlier, later in pairwise(bursts)} == {STEPS_BETWEEN_BURSTS}
        assert answer.tokens == driver().tokens(prompt(5), sampling(max_tokens=100))

    def test_a_command_ends_a_burst(self) -> None:
        class Endless:
            busy, advanced = True, 0

            def advance(self) -> None:
                self.advanced += 1

        endless = Endless()
        trainer = Trainer(cast("FusedTraining", endless), commands_wait=lambda: endless.advanced >= 3)
        trainer.beside(10.0)
        assert endless.advanced == 3

    def test_stop_pause_and_shutdown(self, driver: MakeDriver) -> None:
        log: list[str] = []
        tiny = driver(start_run=lambda _, spec: FakeRun(spec, log, steps=10**6))
        for run_id in ("a", "b", "c"):
            tiny.engine.add(StartTraining(spec(run_id)))
        tiny.step()
        tiny.engine.add(StopTraining("a"))
        tiny.engine.add(StopTraining("b", pause=True))
        tiny.engine.add(StopTraining("unknown"))
        tiny.step()
        stops = {event.run_id: event.paused for event in tiny.training if isinstance(event, StoppedEvent)}
        assert stops == {"a": False, "b": True}
        request = generate(prompt(5), sampling(max_tokens=100))
        tiny.add(request)
        tiny.step()
        outputs, training = tiny.engine.shutdown()
        assert isinstance(outputs, Outputs)
        (failed,) = outputs.items
        assert isinstance(failed, SequenceFailed)
        assert failed.code == "engine_shutdown"
        assert isinstance(training, Training)
        assert isinstance(training.event, StoppedEvent)
        assert (training.event.run_id, training.event.paused) == ("c", True)
        tiny.check_baseline()
