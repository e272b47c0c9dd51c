"""The plain run: one adapter, from the first step to the last."""

from __future__ import annotations

import time

from tenora.errors import TrainingError
from tenora.training.checkpoint import Best
from tenora.training.corpus import Corpus
from tenora.training.events import FinishedEvent, HeldOut, Items, Probe
from tenora.training.journal import Journal
from tenora.training.learner import Learner
from tenora.training.methods.table import find_method
from tenora.training.resident_base import TrainingHost
from tenora.training.spec import TrainSpec


class PlainPlan:
    """One learner."""

    def __init__(self, host: TrainingHost, spec: TrainSpec, journal: Journal) -> None:
        """Read the rows and take up the adapter; raises as `Corpus.load` and `Learner` do."""
        self._learner = Learner(host, spec, load_corpus(spec), journal)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self._learner.progress.step

    def items(self) -> Items:
        """Events, and None where it waits, up to the FinishedEvent."""
        yield from self._learner.fit()
        yield finished(self._learner)

    def save(self) -> None:
        """Write the state after the last whole step."""
        self._learner.save()

    def close(self) -> None:
        """Free the adapter's room."""
        self._learner.close()


def load_corpus(spec: TrainSpec) -> Corpus:
    """The rows that the run's method wants; raises as `Corpus.load`."""
    method = find_method(spec.method)
    return Corpus.load(spec.tasks, kind=method.rows_of(method.own_settings(spec.method_settings)))


def finished(learner: Learner) -> FinishedEvent:
    """What a learner that has ended says.

    Raises:
        TrainingError: it had no step to make.
    """
    progress, spec = learner.progress, learner.spec
    best = progress.best
    if best is None:
        raise TrainingError("The run has no step to make; set n_epochs or max_steps above 0.", code="no_steps")
    return FinishedEvent(
        run_id=spec.run_id,
        path=best.path,
        step=best.step,
        steps=progress.step,
        valid_loss=best.valid_loss,
        valid_accuracy=best.valid_accuracy,
        base_loss=progress.base_loss,
        trained_tokens=progress.trained_tokens,
        seconds=time.monotonic() - learner.started,
        last_loss=progress.last_loss,
        held_out=_held_out(learner, best),
        probe=_probe(learner, best),
        tasks=best.tasks,
        curve=progress.points,
        general_loss=best.general_loss,
        base_general_loss=progress.base_general_loss,
        stopped_early=progress.step < learner.total_steps,
        head=best.head,
    )


def _probe(learner: Learner, best: Best) -> Probe:
    """Of the first task's rows, which come first among the held-out ones."""
    corpus = learner.corpus
    rows = int((corpus.valid_task == 0).sum()) * corpus.valid.rows_per_example
    return Probe(path=learner.spec.tasks[0].valid_path, rows=best.probe[:rows])


def _held_out(learner: Learner, best: Best) -> HeldOut:
    progress = learner.progress
    return HeldOut(tokens=progress.row_tokens, adapter=best.rows, start=progress.start_rows)
