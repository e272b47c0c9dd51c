"""Few-shot: too few rows to hold any out. The step count is chosen by cross-validation, then all rows are learned.

Each fold is trained on the others and measured on its own rows after every epoch, all folds in fused passes. The epoch
with the lowest loss over all rows is where the final fit on all rows ends, on the same learning rate's course. Every
row was measured once by an adapter that had not seen it, so the held-out figures cover all rows.
"""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import numpy as np

from tenora.errors import TrainingError
from tenora.training.checkpoint import Evaluated, write_checkpoint
from tenora.training.evaluation import PROBE_ROWS, general_loss, measure
from tenora.training.host import TrainingHost
from tenora.training.interleave import interleave
from tenora.training.learner import Learner
from tenora.training.packing import Int64Array
from tenora.training.plain import load_corpus
from tenora.training.spec import EvalEvent, FinishedEvent, FoldEvent, HeldOut, Items, Probe, StepEvent, TrainSpec


class FoldsPlan:
    """The learners of all folds, and then the one of all rows."""

    def __init__(self, host: TrainingHost, spec: TrainSpec) -> None:
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
                part, held_out = self._corpus.fold(number, spec.folds, seed=spec.seed)
                own = _spec_of(spec, f"fold-{number}")
                self._folds.append((Learner(host, own, part, checkpoints=False), held_out))
            self._final = Learner(host, _spec_of(spec, "final"), self._corpus)
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
        yield from interleave([self._fold(number) for number in range(len(self._folds))])
        curve = [self._epoch(number) for number in range(len(self._folds[0][0].progress.curve))]
        losses = [epoch.valid_loss for epoch in curve]
        best = min(range(1, len(curve)), key=lambda number: losses[number])
        for number, epoch in enumerate(curve):
            yield EvalEvent(
                run_id=self._spec.run_id,
                step=epoch.step,
                valid_loss=epoch.valid_loss,
                valid_accuracy=epoch.valid_accuracy,
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

    def _fold(self, number: int) -> Items:
        """A fold's course. Its steps are no use alone; its evaluations tell how far the cross-validation is."""
        learner, _ = self._folds[number]
        for item in learner.fit():
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

    def _epoch(self, number: int) -> Evaluated:
        """The folds after an epoch, together: every row under the adapter that had not seen it."""
        rows, correct, tokens = np.zeros(len(self._corpus.train)), 0.0, 0
        for learner, held_out in self._folds:
            found = learner.progress.curve[number]
            rows[held_out] = found.rows
            own = sum(learner.progress.row_tokens)
            correct, tokens = correct + found.valid_accuracy * own, tokens + own
        return Evaluated(
            step=number * self._learner.steps_per_epoch,
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
            general_loss=general,
            base_general_loss=base_general,
            stopped_early=final.progress.step < final.total_steps,
        )


def _spec_of(spec: TrainSpec, name: str) -> TrainSpec:
    """Of a learner: whole epochs, every one of them measured."""
    return msgspec.structs.replace(
        spec,
        workdir=str(Path(spec.workdir) / name),
        folds=0,
        max_steps=0,
        eval_interval=0,
        early_stopping=0,
        general_text=(),
    )
