"""Training runs whose events are given: how they go, and one that goes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenora.training.events import (
    FailedEvent,
    FinishedEvent,
    Recorded,
    RetoldEvent,
    StepEvent,
    StoppedEvent,
    TrainEvent,
    TrialEvent,
)
from tenora.training.spec import TrainSpec


@dataclass(kw_only=True)
class RunScript:
    """How training runs go.

    Attributes:
        training: the events of a run; without them a run waits to be stopped.
        makes_steps: without `training`, a run makes an optimizer step with each step of the engine.
        hold_at: runs wait before this step (of an optimizer, or of a trial) until they may go on, or have to end.
        hold_end: runs wait before the word that ends them.
        in_flight: as many events are on their way when a run is told to end, and come first.
        retold: as many of its first events a run says again, as one that is resumed.
        die_at: the engine dies, once, before this step.
    """

    training: Callable[[TrainSpec], Sequence[TrainEvent]] | None = None
    makes_steps: bool = False
    hold_at: int | None = None
    hold_end: bool = False
    in_flight: int = 0
    retold: int = 0
    die_at: int | None = None


class ScriptedRun:
    """A run that says what is given, an event at a time.

    Attributes:
        held: it waits, as the script has it.
    """

    def __init__(self, spec: TrainSpec, script: RunScript, events: Sequence[TrainEvent]) -> None:
        self.held = False
        self._run_id = spec.run_id
        self._script = script
        recorded = [event for event in events if isinstance(event, Recorded)][: script.retold]
        again: list[TrainEvent] = [RetoldEvent(run_id=spec.run_id, events=recorded)] if recorded else []
        self._events = deque([*again, *events[len(recorded) :]])
        self._ending: StoppedEvent | None = None

    def stop(self, pause: bool) -> None:
        """It has been told to end."""
        self._ending = StoppedEvent(run_id=self._run_id, step=0, paused=pause)

    @property
    def may_go_on(self) -> bool:
        """Whether nothing holds it."""
        event, script = self._upcoming(), self._script
        if is_last(event):
            return not script.hold_end
        return self._ending is not None or script.hold_at is None or _step(event) != script.hold_at

    def next(self) -> TrainEvent:
        """What it says now. Raises RuntimeError where the engine is to die."""
        event, script = self._upcoming(), self._script
        if isinstance(event, StepEvent) and event.step == script.die_at:
            script.die_at = None
            raise RuntimeError("crash")
        if event is not self._ending:
            self._events.popleft()
            script.in_flight -= 1 if self._ending is not None else 0
        return event

    def _upcoming(self) -> TrainEvent:
        if self._ending is not None and not self._script.in_flight:
            return self._ending
        return self._events[0]


def _step(event: TrainEvent) -> int | None:
    return event.step if isinstance(event, StepEvent | TrialEvent) else None


def is_last(event: TrainEvent) -> bool:
    """Whether it ends its run."""
    return isinstance(event, FinishedEvent | FailedEvent | StoppedEvent)


def step_event(run_id: str, step: int) -> StepEvent:
    """An optimizer step of a run whose length nobody asks for."""
    return StepEvent(
        run_id=run_id,
        step=step,
        total_steps=0,
        epoch=0.0,
        train_loss=1.0,
        train_accuracy=0.0,
        learning_rate=0.1,
        grad_norm=1.0,
        trained_tokens=step,
        tokens_per_second=1.0,
    )
