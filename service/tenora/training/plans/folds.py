"""Few-shot: too few rows to hold any out. The step count is chosen by cross-validation, then all rows are learned.

Each fold is trained on the others and measured on its own rows at every evaluation, all folds in fused passes. The
evaluation with the lowest loss over all rows is where the final fit on all rows ends, on the same learning rate's
course. Every row was measured once by an adapter that had not seen it, so the held-out figures cover all rows.

Evaluations are named by the steps of the final fit: after each of its epochs, or every `eval_interval` of its steps. A
fold has fewer rows, so with `n_epochs` it makes as large a share of its own steps until then, which is as many passes;
with `max_steps` it makes as many steps. With `early_stopping` the folds end together, when the loss over all rows has
not fallen for so many evaluations.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np

from tenora.errors import TrainingError
from tenora.training.checkpoint import Evaluated, write_checkpoint
from tenora.training.evaluation import general_loss, measure
from tenora.training.events import (
    PROBE_ROWS,
    EvalEvent,
    EvaluationPoint,
    FinishedEvent,
    FoldEvent,
    HeldOut,
    Items,
    Probe,
    StepEvent,
)
from tenora.training.journal import Journal
from tenora.training.learner import Learner
from tenora.training.packing import Int64Array
from tenora.training.plans.interleave import interleave
from tenora.training.plans.single import load_corpus
from tenora.training.resident_base import TrainingHost
from tenora.training.schedule import evaluation_steps
from tenora.training.spec import TrainSpec

_NEVER = 2**31  # steps: more than any run makes


class FoldsPlan:
    """The learners of all folds, and then the one of all rows."""

    def __init__(self, host: TrainingHost, spec: TrainSpec, journal: Journal) -> None:
        """Read the rows and take up the folds.

        Raises:
            TrainingError: there are fewer rows than folds.
        """
        self._host, self._spec = host, spec
        self._corpus = load_corpus(spec)
        if len(self._corpus.train) < spec.folds:
            raise TrainingError(
                f"{len(self._corpus.train)} rows make no {spec.folds} folds; give more rows or a validation file.",
                code="too_few_examples",
            )
        self._started = time.monotonic()
        self._folds: list[tuple[Learner, Int64Array]] = []
        self._final: Learner | None = None
        try:
            for number in range(spec.folds):
                part, held_out = self._corpus.fold(number, spec.folds, seed=spec.split_seed)
                own = _spec_of(spec, f"fold-{number}")
                self._folds.append((Learner(host, own, part, journal, checkpoints=False), held_out))
            self._final = Learner(host, _spec_of(spec, "final"), self._corpus, journal)
        except BaseException:
            self.close()
            raise
        self._done_before = self._done()

    @property
    def step(self) -> int:
        """Optimizer steps of the fit on all rows."""
        return 0 if self._final is None else self._final.progress.step

    def items(self) -> Items:
        """Events, and None where it waits, up to the FinishedEvent."""
        curve: list[Evaluated] = []
        for step in (0, *self._evaluations()):
            yield from interleave([self._fold(number, step) for number in range(len(self._folds))])
            curve.append(self._together(step))
            if self._is_stale([found.valid_loss for found in curve[1:]]):
                break
        losses = [found.valid_loss for found in curve]
        best = min(range(1, len(curve)), key=lambda number: losses[number])
        for number, found in enumerate(curve):
            yield EvalEvent(
                run_id=self._spec.run_id,
                step=found.step,
                valid_loss=found.valid_loss,
                valid_accuracy=found.valid_accuracy,
                base_loss=losses[0],
                best=0 < number <= best and losses[number] == min(losses[1 : number + 1]),
            )
        for item in self._learner.fit(curve[best].step):
            if isinstance(item, StepEvent):
                yield msgspec.structs.replace(item, trained_tokens=self._trained_tokens())
            else:
                yield item
        yield from self._finished(curve, best)

    def save(self) -> None:
        """Write the state of every learner after its last whole step."""
        for learner, _ in self._folds:
            learner.save()
        if self._final is not None:
            self._final.save()

    def close(self) -> None:
        """Free the room of all adapters."""
        for learner, _ in self._folds:
            learner.close()
        if self._final is not None:
            self._final.close()
        self._folds, self._final = [], None

    @property
    def _learner(self) -> Learner:
        """The one of all rows."""
        if self._final is None:
            raise RuntimeError("the run was closed.")
        return self._final

    def _evaluations(self) -> list[int]:
        """The steps of the fit on all rows at which it is decided whether it ends there."""
        final = self._learner
        return evaluation_steps(final.total_steps, self._spec.eval_interval or final.steps_per_epoch)

    def _steps_of(self, learner: Learner, step: int) -> int:
        """What a fold has made when the fit on all rows has made `step` steps."""
        if not step:
            return 0
        return max(1, round(step * learner.total_steps / self._learner.total_steps))

    def _is_stale(self, losses: list[float]) -> bool:
        """Whether the loss over all rows has not fallen for as many evaluations as the run waits."""
        patience = self._spec.early_stopping
        return 0 < patience < len(losses) and min(losses[:-patience]) <= min(losses[-patience:])

    def _fold(self, number: int, step: int) -> Items:
        """A fold's course up to there. Its steps are no use alone; its evaluations tell how far all of it is."""
        learner, _ = self._folds[number]
        for item in learner.fit(self._steps_of(learner, step)):
            if item is None:
                yield None
            elif isinstance(item, EvalEvent) and item.step:
                before = [epoch.valid_loss for epoch in learner.progress.curve[1:]]  # `item` is not among them yet
                yield FoldEvent(
                    run_id=self._spec.run_id,
                    fold=number,
                    step=item.step,
                    total_steps=learner.total_steps,
                    valid_loss=min([*before, item.valid_loss]),
                    base_loss=item.base_loss,
                    trained_tokens=self._trained_tokens(),
                    done=self._done(),
                    done_before=self._done_before,
                )

    def _done(self) -> float:
        """Share of the steps of all folds that are made."""
        made = sum(learner.progress.step for learner, _ in self._folds)
        return made / max(sum(learner.total_steps for learner, _ in self._folds), 1)

    def _trained_tokens(self) -> int:
        """Learned tokens of all folds and of the fit on all rows."""
        learners = [self._learner, *(learner for learner, _ in self._folds)]
        return sum(learner.progress.trained_tokens for learner in learners)

    def _together(self, step: int) -> Evaluated:
        """The folds at an evaluation, together: every row under the adapter that had not seen it."""
        rows, correct, tokens = np.zeros(len(self._corpus.train)), 0.0, 0
        for learner, held_out in self._folds:
            own_step = self._steps_of(learner, step)
            found = next(found for found in learner.progress.curve if found.step == own_step)
            rows[held_out] = found.rows
            own = sum(learner.progress.row_tokens)
            correct, tokens = correct + found.valid_accuracy * own, tokens + own
        return Evaluated(
            step=step,
            valid_loss=float(rows.sum()) / max(tokens, 1),
            valid_accuracy=correct / max(tokens, 1),
            rows=rows.tolist(),
        )

    def _finished(self, curve: list[Evaluated], best: int) -> Items:
        """Write the adapter of all rows and measure what the serving path must give."""
        final, spec = self._learner, self._spec
        train = self._corpus.train
        probe = train.select(np.arange(min(PROBE_ROWS, len(train))))
        found = yield from measure(self._host.queue, spec, probe, final.adapter, capacity=final.capacity)
        general = yield from general_loss(self._host, spec, final.adapter, capacity=final.capacity)
        base_general = yield from general_loss(self._host, spec, None, capacity=final.capacity)
        path = write_checkpoint(final.spec, final.adapter, final.progress.step)
        tokens = np.zeros(len(train), dtype=np.int64)
        for learner, held_out in self._folds:
            tokens[held_out] = learner.progress.row_tokens
        yield FinishedEvent(
            run_id=spec.run_id,
            path=str(path),
            step=final.progress.step,
            steps=final.progress.step,
            valid_loss=curve[best].valid_loss,
            valid_accuracy=curve[best].valid_accuracy,
            base_loss=curve[0].valid_loss,
            trained_tokens=self._trained_tokens(),
            seconds=time.monotonic() - self._started,
            last_loss=curve[-1].valid_loss,
            held_out=HeldOut(tokens=tokens.tolist(), adapter=curve[best].rows, start=curve[0].rows),
            probe=Probe(path=spec.tasks[0].train_path, rows=found.probe),
            curve=[
                EvaluationPoint(step=found.step, valid_loss=found.valid_loss, valid_accuracy=found.valid_accuracy)
                for found in curve
            ],
            general_loss=general,
            base_general_loss=base_general,
            stopped_early=final.progress.step < final.total_steps,
        )


def _spec_of(spec: TrainSpec, name: str) -> TrainSpec:
    """Of a learner, which is told where to stop and to be measured."""
    return msgspec.structs.replace(
        spec,
        workdir=str(Path(spec.workdir) / name),
        folds=0,
        eval_interval=_NEVER,
        early_stopping=0,
        general_text=(),
    )
