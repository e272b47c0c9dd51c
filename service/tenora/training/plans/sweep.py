"""A sweep: many settings trained at once in fused passes, the worse ones stopped early, one winner.

Successive halving (`recipes.halving_rungs`): all trials run to the first rung, the better third to the next, and so on;
trials are compared by the best held-out loss that they have reached. Rungs are shares of each trial's own schedule, so
trials of other lengths and batch sizes compare at the same point of their learning rate's course.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Generator
from pathlib import Path

import msgspec

from tenora.adapters.atomic import replace_file
from tenora.errors import TrainingError
from tenora.model.device import survive
from tenora.training.evaluation import general_loss
from tenora.training.events import EvalEvent, FinishedEvent, Items, TrialEvent, TrialStatus
from tenora.training.failures import explain
from tenora.training.journal import Journal
from tenora.training.learner import Learner
from tenora.training.plans.interleave import interleave
from tenora.training.plans.single import finished, load_corpus
from tenora.training.recipes import halving_rungs
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import TrainSpec, trial_of

_log = logging.getLogger(__name__)


class _Ended(msgspec.Struct, frozen=True, kw_only=True):
    """A trial that goes no further."""

    status: TrialStatus
    step: int
    total_steps: int
    valid_loss: float | None
    reason: str = ""
    trained_tokens: int = 0


class SweepPlan:
    """All trials of a run, each a learner with a directory of its own."""

    def __init__(self, host: TrainingHost, spec: TrainSpec, journal: Journal) -> None:
        """Read the rows, and take up the trials that are still in the race."""
        self._host, self._spec, self._journal = host, spec, journal
        self._file = Path(spec.workdir) / "sweep.json"
        self._ended: dict[int, _Ended] = {}
        if self._file.exists():
            self._ended = msgspec.json.decode(self._file.read_bytes(), type=dict[int, _Ended])
        self._started = time.monotonic()
        self._learners: dict[int, Learner] = {}
        corpus = load_corpus(spec)
        try:
            for number in range(len(spec.trials)):
                if number not in self._ended or self._ended[number].status == "finished":
                    self._learners[number] = Learner(host, _spec_of(spec, number), corpus, journal)
        except BaseException:
            self.close()
            raise

    @property
    def step(self) -> int:
        """Optimizer steps of the trial that is furthest."""
        return max((learner.progress.step for learner in self._learners.values()), default=0)

    def items(self) -> Items:
        """Events, and None where it waits, up to the FinishedEvent."""
        yield from self._measure_base()
        for share, survivors in halving_rungs(len(self._spec.trials)):
            alive = [number for number in self._learners if number not in self._ended]
            yield from interleave([self._reach(number, share) for number in alive])
            yield from self._halve(survivors)
        for number in [number for number in self._learners if number not in self._ended]:
            yield self._end(number, "finished")
        yield self._winner()

    def save(self) -> None:
        """Write the state of every trial after its last whole step."""
        for learner in self._learners.values():
            learner.save()

    def close(self) -> None:
        """Free the room of all adapters."""
        for learner in self._learners.values():
            learner.close()
        self._learners.clear()

    def _measure_base(self) -> Generator[None, None, None]:
        """Once for all trials. A starting adapter is of each trial's own shape, and measured by each."""
        waiting = [learner for learner in self._learners.values() if learner.progress.evaluated_step < 0]
        if waiting and not self._spec.init_path:
            first = waiting[0]
            found = yield from first.measure()
            yield from general_loss(self._host, self._spec, None, capacity=first.capacity)
            for learner in waiting:
                learner.start = found

    def _reach(self, number: int, share: float) -> Items:
        """Train one trial to a rung. What goes wrong with it ends it alone."""
        learner = self._learners[number]
        try:
            for item in learner.fit(max(1, math.ceil(share * learner.total_steps))):
                if item is None:
                    yield None
                elif isinstance(item, EvalEvent) and item.step:
                    yield self._event(number, "running", told=item)
        except Exception as error:  # noqa: BLE001  # ends this trial alone; the others may still win
            survive(error, self._host.decoder.device)
            _, reason = explain(error, learner.progress.step)
            _log.warning("trial %d of run %s failed: %s", number, self._spec.run_id, reason, exc_info=error)
            yield self._end(number, "failed", reason)

    def _halve(self, survivors: int) -> Items:
        """Stop the worse trials."""
        alive = [number for number in self._learners if number not in self._ended]
        for number in sorted(alive, key=lambda number: (self._loss(number), number))[survivors:]:
            yield self._end(number, "stopped")

    def _end(self, number: int, status: TrialStatus, reason: str = "") -> TrialEvent:
        """Remember it before anything else, so that a killed run does not take the trial up again."""
        learner = self._learners[number]
        self._ended[number] = _Ended(
            status=status,
            step=learner.progress.step,
            total_steps=learner.total_steps,
            valid_loss=self._best(number),
            reason=reason,
            trained_tokens=learner.progress.trained_tokens,
        )
        event = self._event(number, status, reason)
        self._journal.save(upcoming=event)
        replace_file(self._file, msgspec.json.encode(self._ended))
        if status != "finished":
            self._learners.pop(number).close()
        return event

    def _event(
        self, number: int, status: TrialStatus, reason: str = "", *, told: EvalEvent | None = None
    ) -> TrialEvent:
        learner = self._learners[number]
        return TrialEvent(
            run_id=self._spec.run_id,
            trial=number,
            status=status,
            step=learner.progress.step,
            total_steps=learner.total_steps,
            trained_tokens=self._trained_tokens(),
            valid_loss=self._best(number, told),
            reason=reason,
        )

    def _loss(self, number: int) -> float:
        best = self._best(number)
        return math.inf if best is None else best

    def _best(self, number: int, told: EvalEvent | None = None) -> float | None:
        """The lowest loss of a trial; an evaluation that was just told is not part of its learner's progress yet."""
        found = (self._learners[number].progress.best, told)
        return min((evaluated.valid_loss for evaluated in found if evaluated is not None), default=None)

    def _trained_tokens(self) -> int:
        """Learned tokens of all trials: of those that were closed, what they had come to, also before a resume."""
        closed = (ended.trained_tokens for number, ended in self._ended.items() if number not in self._learners)
        return sum(closed) + sum(learner.progress.trained_tokens for learner in self._learners.values())

    def _winner(self) -> FinishedEvent:
        if not self._learners:
            reasons = "; ".join(dict.fromkeys(ended.reason for ended in self._ended.values() if ended.reason))
            raise TrainingError(f"Every trial of the sweep failed: {reasons}", code="training_failed")
        number = min(self._learners, key=lambda number: (self._loss(number), number))
        return msgspec.structs.replace(
            finished(self._learners[number]),
            trial=number,
            trained_tokens=self._trained_tokens(),
            seconds=time.monotonic() - self._started,
        )


def _spec_of(spec: TrainSpec, number: int) -> TrainSpec:
    return msgspec.structs.replace(trial_of(spec, number), workdir=str(Path(spec.workdir) / f"trial-{number:03d}"))
