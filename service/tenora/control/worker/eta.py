"""When a run will end, from what it has said since it was started or resumed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tenora.training.events import EvalEvent, FoldEvent, ProgressEvent, StepEvent, TrainEvent, TrialEvent
from tenora.training.recipes import halving_rungs
from tenora.training.spec import TrainSpec, trial_of

_MEMORY = 0.1  # weight of the newest duration: the pace follows the load of the machine


@dataclass(slots=True)
class _Duration:
    """A mean of durations that follows the newest ones, in seconds."""

    count: int = 0
    mean: float = 0.0

    def add(self, seconds: float) -> None:
        self.count += 1
        self.mean += (seconds - self.mean) * max(_MEMORY, 1 / self.count)


@dataclass(slots=True)
class Eta:
    """Steps and evaluations of a run, or the trials of its sweep, or its folds, against the clock.

    Attributes:
        before: of a sweep that is resumed, which share of its schedule each trial had done.
        total_steps: of the run, as it last said.
    """

    spec: TrainSpec
    before: dict[int, float] = field(default_factory=dict)
    clock: Callable[[], float] = time.monotonic
    total_steps: int = 0
    _last: float | None = None
    _step: int | None = None
    _steps: _Duration = field(default_factory=_Duration)
    _evaluations: _Duration = field(default_factory=_Duration)
    _trials: list[TrainSpec] = field(default_factory=list)
    _shares: dict[int, float] = field(default_factory=dict)
    _ended: set[int] = field(default_factory=set)
    _fit_seconds: float | None = None  # of a cross-validation: that the whole schedule on all rows would take
    _chosen_steps: int = 0  # at which the fit on all rows ends; 0 while that is not known
    _started: float = 0.0

    def __post_init__(self) -> None:
        self._started = self.clock()
        self._trials = [trial_of(self.spec, number) for number in range(len(self.spec.trials))]
        self._shares = {number: self.before.get(number, 0.0) for number in range(len(self._trials))}

    def left(self, event: TrainEvent) -> float | None:
        """Seconds that the run will still take, as far as `event` and those before it tell; None until they do."""
        now = self.clock()
        try:
            match event:
                case StepEvent():
                    return self._after_step(event, now)
                case EvalEvent():
                    return self._after_evaluation(event, now)
                case TrialEvent():
                    return self._after_trial(event, now)
                case FoldEvent():
                    return self._after_fold(event, now)
                case ProgressEvent():
                    return (now - self._started) * (event.total - event.done) / max(event.done, 1)
            return None
        finally:
            self._last = now

    def recall(self, event: TrainEvent) -> None:
        """The run said so before it was resumed: how far it was then, which took none of the present time."""
        if isinstance(event, StepEvent):
            self.total_steps = event.total_steps
        elif isinstance(event, TrialEvent):
            self._shares[event.trial] = self.before[event.trial] = event.step / max(event.total_steps, 1)
            if event.status != "running":
                self._ended.add(event.trial)

    def _after_step(self, event: StepEvent, now: float) -> float | None:
        self.total_steps = event.total_steps
        if self._last is not None and self._step is not None and event.step > self._step:
            self._steps.add((now - self._last) / (event.step - self._step))
        self._step = event.step
        return self._remaining(event.step)

    def _after_evaluation(self, event: EvalEvent, now: float) -> float | None:
        if self.spec.folds:
            return self._after_epoch(event)
        if self._last is not None:
            self._evaluations.add(now - self._last)
        return self._remaining(event.step)

    def _after_epoch(self, event: EvalEvent) -> float | None:
        """All epochs are told, folds together, when the folds are over: the last best one is where the fit will end."""
        if event.best:
            self._chosen_steps = event.step
        if self._fit_seconds is None or not event.step:
            return self._fit_seconds
        return self._fit_seconds * self._chosen_steps / event.step

    def _remaining(self, step: int) -> float | None:
        if not self._steps.count or not self.total_steps:
            return None
        if self.spec.folds:  # the fit on all rows measures nothing
            return self._steps.mean * ((self._chosen_steps or self.total_steps) - step)
        interval = self.spec.eval_interval or max(1, round(self.total_steps / max(self.spec.n_epochs, 1)))
        evaluations = math.ceil(self.total_steps / interval) - step // interval
        return self._steps.mean * (self.total_steps - step) + self._evaluations.mean * evaluations

    def _after_trial(self, event: TrialEvent, now: float) -> float | None:
        """A sweep's trials move together; what they still have to do follows from how they are halved."""
        self._shares[event.trial] = event.step / max(event.total_steps, 1)
        if event.status != "running":
            self._ended.add(event.trial)
        done = sum(
            (share - self.before.get(number, 0.0)) * self._size(number) for number, share in self._shares.items()
        )
        return None if done <= 0 else self._trial_work() * (now - self._started) / done

    def _after_fold(self, event: FoldEvent, now: float) -> float | None:
        """Each fold leaves its own rows out, so k of them see all rows k - 1 times; the fit that follows once more.

        The fit is taken to go to the end of its schedule until the folds have chosen where it ends.
        """
        rounds, made = max(self.spec.folds - 1, 1), event.done - event.done_before
        if made <= 0:
            return None
        self._fit_seconds = (now - self._started) / (made * rounds)
        return self._fit_seconds * ((1 - event.done) * rounds + 1)

    def _trial_work(self) -> float:
        """What the trials still have to do: at each rung those that are furthest are taken to go on."""
        shares = self._shares
        alive = sorted(shares.keys() - self._ended, key=lambda number: (-shares[number], number))
        work, before, runners = 0.0, 0.0, len(shares)
        for share, survivors in halving_rungs(len(self.spec.trials)):
            work += sum(
                self._size(number) * max(0.0, share - max(before, shares[number])) for number in alive[:runners]
            )
            before, runners = share, survivors
        return work

    def _size(self, number: int) -> float:
        """Rows that a trial sees in all, in any unit that all trials share."""
        trial = self._trials[number]
        return float(trial.max_steps * trial.batch_size or trial.n_epochs)
