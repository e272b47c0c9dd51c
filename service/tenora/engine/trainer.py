"""Hosts training beside serving: events come out as messages, work is done in slices of time."""

from __future__ import annotations

from collections.abc import Callable

from tenora.engine.clock import Clock, HostClock
from tenora.engine.messages import Training
from tenora.training.commands import RunCommand
from tenora.training.fusion import FusedTraining
from tenora.training.spec import SessionSpec, TrainSpec

STEPS_BETWEEN_BURSTS = 24
"""Of generation: fewer than 5 % of the gaps between tokens then hold a burst."""
LONGEST_BURST_SECONDS = 0.6


class Trainer:
    """All runs of the engine, trained together on the resident base.

    Beside generation, training has its share of the time in bursts, not after every step: 19 of 20 gaps between two
    tokens are then those of an idle server, at the same speed of both. A command that arrives ends a burst at the next
    layer boundary. Time is the device's: on a GPU a layer is enqueued in a moment, and a burst that counted the host's
    time would hold up the next step by all the layers that it had enqueued.
    """

    def __init__(
        self,
        training: FusedTraining,
        *,
        share: float = 0.5,
        commands_wait: Callable[[], bool] = lambda: False,
        clock: Clock | None = None,
    ) -> None:
        """Nothing trains yet.

        Args:
            training: what is hosted.
            share: of the time while sequences generate, above 0 and below 1.
            commands_wait: whether a command has arrived that nobody has taken yet.
            clock: of the device that trains; None: the host's.
        """
        self._training = training
        self._owed_per_second = share / (1.0 - share)
        self._commands_wait = commands_wait
        self._clock = clock or HostClock()
        self._taken = 0.0  # by the last slice
        self._owed, self._steps = 0.0, 0  # since the last burst

    @property
    def active(self) -> int:
        """Runs that have not ended."""
        return self._training.active

    @property
    def busy(self) -> bool:
        """Whether a slice would get anything done: not if every run waits for a command, or for sequences."""
        return self._training.busy

    @property
    def trained_tokens(self) -> int:
        """Learned tokens that had a gradient, over all runs since the start."""
        return self._training.trained_tokens

    def start(self, spec: TrainSpec | SessionSpec) -> None:
        """Begin or resume a run. Ignored if it is in progress."""
        self._training.start(spec)

    def put(self, run_id: str, command: RunCommand) -> None:
        """Tell a run to do something; its answer, or why there is none, is an event."""
        self._training.put(run_id, command)

    def acknowledge(self, run_id: str, count: int) -> None:
        """Tell a run what of its events is recorded. Unknown ids are ignored: it may have ended meanwhile."""
        self._training.acknowledge(run_id, count)

    def stop(self, run_id: str, *, pause: bool) -> None:
        """Ask a run to end. Unknown ids are ignored: it may have ended meanwhile."""
        self._training.stop(run_id, pause=pause)

    def beside(self, seconds: float) -> list[Training]:
        """After a step of generation that took so long: a burst of training, if one is due."""
        if not self._training.busy:
            self._owed, self._steps = 0.0, 0
            return []
        self._owed += seconds * self._owed_per_second
        self._steps += 1
        if self._steps < STEPS_BETWEEN_BURSTS and self._owed < LONGEST_BURST_SECONDS:
            return []
        events = self.slice(self._owed)
        self._owed, self._steps = max(0.0, self._owed - self._taken), 0
        return events

    def slice(self, seconds: float, *, drain: bool = True) -> list[Training]:
        """Work for about `seconds`: at least one item if a run can go on, and items are not interrupted.

        Args:
            drain: nothing of it is under way any more at the end: the next step of generation waits for none of it.
                Where no step is expected, what was enqueued last goes on, and the device is not idle before the next
                slice; it is two items at most.
        """
        events: list[Training] = []
        if not self._training.busy:
            return events
        self._clock.start()
        while self._training.busy:
            event = self._training.advance()
            if event is not None:
                events.append(Training(event))
            if self._clock.lap() >= seconds or self._commands_wait():
                break
        if drain:
            self._taken = self._clock.stop()
        return events

    def shutdown(self) -> list[Training]:
        """Pause every run and see it to its end."""
        self._training.stop_all(pause=True)
        return [Training(event) for event in iter(self._training) if event is not None]
