"""Hosts training runs inside the engine: a few items at a time, between decode steps."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import Protocol

from tenora.engine.messages import Training
from tenora.errors import TenoraError
from tenora.training.spec import FailedEvent, FinishedEvent, StepEvent, StoppedEvent, TrainEvent, TrainSpec

_log = logging.getLogger(__name__)


class Run(Protocol):
    """What is hosted; `tenora.training.run.TrainingRun` is one."""

    def __iter__(self) -> Iterator[TrainEvent | None]:
        """Events, and None where something else may be done in between."""
        ...

    def stop(self, *, pause: bool) -> None:
        """End at the next item; a StoppedEvent is the last one then."""
        ...


class Trainer:
    """Runs take turns, one item each. A run that raises ends with a FailedEvent; the others never notice.

    Attributes:
        trained_tokens: tokens with a loss over all runs since start.
    """

    def __init__(self, start: Callable[[TrainSpec], Run]) -> None:
        self.trained_tokens = 0
        self._start = start
        self._runs: dict[str, Run] = {}
        self._items: dict[str, Iterator[TrainEvent | None]] = {}
        self._counted: dict[str, int] = {}
        self._turns: deque[str] = deque()
        self._events: list[Training] = []

    @property
    def active(self) -> int:
        """Runs that have not ended."""
        return len(self._runs)

    def start(self, spec: TrainSpec) -> None:
        """Begin or resume a run. Ignored if it is in progress."""
        if spec.run_id in self._runs:
            return
        try:
            run = self._start(spec)
            items = iter(run)
        except Exception as error:  # noqa: BLE001 — concerns this run alone, which reports it
            self._events.append(Training(_failed(spec.run_id, error)))
            return
        self._runs[spec.run_id] = run
        self._items[spec.run_id] = items
        self._turns.append(spec.run_id)

    def stop(self, run_id: str, *, pause: bool) -> None:
        """Ask a run to end. Unknown ids are ignored: it may have ended meanwhile."""
        if (run := self._runs.get(run_id)) is not None:
            run.stop(pause=pause)

    def slice(self, seconds: float) -> list[Training]:
        """Work for about `seconds`: at least one item if there is a run, and items are not interrupted."""
        deadline = time.monotonic() + seconds
        while self._turns:
            self._turns.rotate(-1)
            self._advance(self._turns[-1])
            if time.monotonic() >= deadline:
                break
        return self._take_events()

    def shutdown(self) -> list[Training]:
        """Pause every run and see it to its end."""
        for run in self._runs.values():
            run.stop(pause=True)
        while self._turns:
            self._advance(self._turns[0])
        return self._take_events()

    def _advance(self, run_id: str) -> None:
        """One item of the run whose turn it is."""
        try:
            event = next(self._items[run_id])
        except StopIteration:
            self._end(run_id)
            return
        except Exception as error:  # noqa: BLE001 — concerns this run alone, which reports it
            event = _failed(run_id, error)
        if event is None:
            return
        self._events.append(Training(event))
        if isinstance(event, StepEvent):
            self._count(event)
        if isinstance(event, FinishedEvent | StoppedEvent | FailedEvent):
            self._end(run_id)

    def _count(self, event: StepEvent) -> None:
        """A run's own count spans its whole life; what it trained before it was resumed here is not ours."""
        before = self._counted.get(event.run_id, 0 if event.step == 1 else event.trained_tokens)
        self.trained_tokens += max(event.trained_tokens - before, 0)
        self._counted[event.run_id] = event.trained_tokens

    def _end(self, run_id: str) -> None:
        del self._runs[run_id], self._items[run_id]
        self._counted.pop(run_id, None)
        self._turns.remove(run_id)

    def _take_events(self) -> list[Training]:
        events, self._events = self._events, []
        return events


def _failed(run_id: str, error: Exception) -> FailedEvent:
    _log.warning("a training run failed", extra={"run": run_id}, exc_info=error)
    if isinstance(error, TenoraError):
        return FailedEvent(run_id=run_id, code=error.code or "training_failed", message=error.message)
    return FailedEvent(
        run_id=run_id, code="training_failed", message=f"The run failed: {type(error).__name__}: {error}"
    )
