"""One adapter in training: optimizer steps and evaluations in turn. It reads as a flat script.

A learner raises what goes wrong with it, and yields None where it waits for its rows to pass through the base. Runs
are made of learners: one for a plain job, one per trial of a sweep, one per fold of a cross-validation.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from tenora.adapters.weights import AdapterWeights
from tenora.training.arena import TrainedAdapter
from tenora.training.checkpoint import (
    Best,
    Evaluated,
    Progress,
    State,
    fingerprint,
    load_ranks,
    load_state,
    prune_checkpoints,
    save_ranks,
    save_state,
    thinned,
    write_checkpoint,
)
from tenora.training.commands import AdamWSettings
from tenora.training.corpus import Corpus
from tenora.training.eva import begin_by_variance
from tenora.training.evaluation import Evaluation, finish, general_loss, measure
from tenora.training.events import CheckpointEvent, EvalEvent, EvaluationPoint, Items, StepEvent
from tenora.training.init_from import start_adapter
from tenora.training.journal import Journal
from tenora.training.methods.method import Figures, Learning
from tenora.training.methods.table import find_method
from tenora.training.optimizer import AdamW, clip_grad_norm
from tenora.training.packing import PackedRows, microbatches, shared_prefix
from tenora.training.pass_queue import Dropping, Work
from tenora.training.resident_base import TrainingHost
from tenora.training.schedule import learning_rate
from tenora.training.spec import TrainSpec
from tenora.training.step import LoraDropout, TokenLosses
from tenora.training.watch import Watch

STATE_INTERVAL_SECONDS = 120.0
"""At most this much work is lost when the process is killed between two evaluations."""


class Learner:
    """One adapter between two boundaries of the engine.

    Weights, moments and `progress` change together, with no yield in between: whenever the learner is left,
    they are the state after the last whole step.

    Attributes:
        progress: how far it is.
        total_steps: of its schedule.
        parent: the adapter that it began as, if it is another one.
        start: the base on the held-out rows, if somebody has measured it for several learners.
    """

    def __init__(
        self, host: TrainingHost, spec: TrainSpec, corpus: Corpus, journal: Journal, *, checkpoints: bool = True
    ) -> None:
        """Make room for the adapter, and begin it or take up its saved state.

        Args:
            spec: of this adapter; its `workdir` is the learner's alone.
            journal: of the run; saved before each state.
            checkpoints: write one at each evaluation. Otherwise the losses of all evaluations are kept row by row.

        Raises:
            TrainingError: the adapter cannot be, or the saved state is of another run or unreadable.
        """
        self.host, self.spec, self.corpus = host, spec, corpus
        self._journal = journal
        self.workdir = Path(spec.workdir)
        self.steps_per_epoch = corpus.steps_per_epoch(spec.batch_size)
        self.total_steps = spec.max_steps or spec.n_epochs * self.steps_per_epoch
        method = find_method(spec.method)
        heads = method.head_rows(method.own_settings(spec.method_settings), corpus.train)
        self.adapter = host.arena.add(spec.lora, load_ranks(self.workdir), heads=heads)
        self._learning: Learning | None = None
        try:
            self.adapter.initialise(spec.seed)
            self.parent: AdapterWeights | None = None
            if spec.init_path:
                self.parent = start_adapter(self.adapter, Path(spec.init_path), host.arena.rows)
            self._learning = method.learning(self)
            self.corpus = self._learning.corpus
            self._learning.begin()
            self.optimizer = AdamW(self.adapter, self.adapter.rates)
            self.belongs_to = fingerprint(spec, corpus.train, corpus.valid)
            restored = load_state(self.workdir, self._state(Progress()))
        except BaseException:
            self.close()
            raise
        self.progress = restored or Progress()
        self._begins_by_variance = restored is None and spec.lora.init == "eva" and not spec.init_path
        self.dropout = LoraDropout(spec.lora.dropout, host.decoder.device) if spec.lora.dropout else None
        self.capacity = host.part_tokens(spec.tokens_per_microbatch, recompute=spec.recompute_activations)
        self._shared = (0, 0)  # tokens that every row of the training and of the held-out rows begins with
        alone = self._learning.reads_whole_rows or not spec.packing or spec.lora.dropout
        if host.shares_prefixes and not alone:
            invocation = spec.lora.invocation
            self._shared = (shared_prefix(corpus.train, invocation), shared_prefix(corpus.valid, invocation))
        self._checkpoints = checkpoints
        self._watch = Watch(corpus)
        self.start: Evaluation | None = None
        self._until = self.total_steps
        self.started = time.monotonic() - self.progress.seconds
        self.saved = time.monotonic()

    @property
    def learning(self) -> Learning:
        """The method at work."""
        if self._learning is None:
            raise RuntimeError("the learner did not begin.")
        return self._learning

    @property
    def stopped_early(self) -> bool:
        """Whether the held-out loss has not fallen for so many evaluations that the run asked to end."""
        return 0 < self.spec.early_stopping <= self.progress.stale

    def fit(self, until: int | None = None) -> Items:
        """Events and boundaries up to step `until`, evaluated, or to the end of the schedule.

        Without held-out rows nothing is evaluated, and no checkpoint is written.
        """
        self._until = self.total_steps if until is None else min(until, self.total_steps)
        if self._begins_by_variance:
            yield from self._begin_by_variance()
        while True:
            if self._evaluation_is_due():
                yield from self._evaluate()
            if self.progress.step >= self._until or self.stopped_early:
                return
            yield from self._step()
            if time.monotonic() - self.saved > STATE_INTERVAL_SECONDS:
                self.save()

    def save(self) -> None:
        """Write the state after the last whole step."""
        self.progress = msgspec.structs.replace(self.progress, seconds=time.monotonic() - self.started)
        self._journal.save()
        save_state(self.workdir, self._state(self.progress, over=self._is_over()))
        self.saved = time.monotonic()

    def close(self) -> None:
        """Free the adapter's room."""
        self.adapter.remove()
        if self._learning is not None:
            self._learning.close()

    def frozen_copy(self) -> TrainedAdapter:
        """A second adapter with the weights of now; see `tenora.training.methods.method.Learner`."""
        copy = self.host.arena.add(self.spec.lora, self.adapter.ranks)
        copy.weights.copy_(self.adapter.weights)
        copy.refresh()
        return copy

    def measured(
        self, parts: Sequence[PackedRows], adapter: TrainedAdapter | None
    ) -> Generator[None, None, list[TokenLosses]]:
        """The losses of parts under an adapter, or the base, without a gradient."""
        spec = self.spec
        readout = self.learning.readout
        asked = Work(spec.run_id, spec.share_group, parts, adapter, readout=readout, weight=spec.weight)
        work = yield from finish(self.host.queue, asked)
        return work.results

    def _is_over(self) -> bool:
        """Whether no step and no evaluation follow, and the best adapter was written."""
        now = self.progress
        written = self._checkpoints and now.best is not None and now.evaluated_step == now.step
        return written and (now.step >= self.total_steps or self.stopped_early)

    def _state(self, progress: Progress, *, over: bool = False) -> State:
        return State(self.optimizer, self.learning.state(), progress, self.belongs_to, over)

    def _begin_by_variance(self) -> Items:
        """Let the adapter begin where the first rows say; a crash before the state is saved repeats it."""

        def first() -> Iterator[PackedRows]:
            for step in itertools.count():
                yield from self._microbatches(step)

        ranks, directions = yield from begin_by_variance(self.host.decoder, self.adapter, first())
        self.host.arena.reshape(self.adapter, ranks)
        self.adapter.initialise(self.spec.seed)
        self.adapter.begin_as(directions)
        self.learning.begin()
        self.optimizer = AdamW(self.adapter, self.adapter.rates)
        save_ranks(self.workdir, ranks)
        self._begins_by_variance = False
        self.save()

    # ---- one optimizer step ---------------------------------------------------------------------------------------

    def _step(self) -> Items:
        step, spec, before = self.progress.step, self.spec, time.monotonic()
        parts = self._microbatches(step)
        self._watch.learns(step + 1, parts)
        yield from self.learning.prepare(parts)
        work = yield from finish(self.host.queue, self._work(parts))
        self._watch.losses(step + 1, parts, work.results)
        found = self.learning.measure(step + 1, parts, work.results)
        start = self.progress.base_loss if self.progress.evaluated_step >= 0 else None
        self._watch.course(step + 1, parts, found.loss, start)
        self.adapter.kind.gradients(self.adapter)
        norm = clip_grad_norm(self.adapter.grad, spec.max_grad_norm)
        self._watch.gradient(step + 1, parts, norm)
        rate = learning_rate(
            step,
            peak=spec.learning_rate,
            total_steps=self.total_steps,
            warmup_ratio=spec.warmup_ratio,
            scheduler=spec.scheduler,
        )
        self.optimizer.step(AdamWSettings(learning_rate=rate, weight_decay=spec.weight_decay))
        self._advance(found, sum(len(part.targets) for part in parts))
        yield StepEvent(
            run_id=spec.run_id,
            step=step + 1,
            total_steps=self.total_steps,
            epoch=(step + 1) / self.steps_per_epoch,
            train_loss=found.loss,
            train_accuracy=found.accuracy,
            learning_rate=rate,
            grad_norm=norm,
            trained_tokens=self.progress.trained_tokens,
            tokens_per_second=sum(part.row_tokens for part in parts) / max(time.monotonic() - before, 1e-9),
            metrics=found.metrics,
        )

    def _microbatches(self, step: int) -> list[PackedRows]:
        """The rows of a step; TrainingError if they must be together and there is no room for that."""
        spec, whole = self.spec, self.learning.needs_whole_steps
        examples = self.corpus.batch(step, spec.batch_size, seed=spec.seed)
        parts = microbatches(
            self.corpus.train,
            examples,
            sys.maxsize if whole else self.capacity if spec.packing else 1,
            shared=self._shared[0],
            invocation=spec.lora.invocation,
        )
        if whole:
            self.host.require_room(step + 1, parts[0].tokens)
        return parts

    def _work(self, parts: Sequence[PackedRows]) -> Work:
        spec = self.spec
        return Work(
            spec.run_id,
            spec.share_group,
            parts,
            self.adapter,
            self.learning.objective(parts),
            None if self.dropout is None else Dropping(self.dropout, spec.seed, self.progress.step),
            self.learning.readout,
            weight=spec.weight,
            recompute=bool(spec.recompute_activations),
        )

    def _advance(self, found: Figures, count: int) -> None:
        now = self.progress
        self.progress = msgspec.structs.replace(
            now,
            step=now.step + 1,
            trained_tokens=now.trained_tokens + count,
            window_loss=now.window_loss + found.loss * count,
            window_correct=now.window_correct + found.accuracy * count,
            window_tokens=now.window_tokens + count,
        )

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        if len(self.corpus.valid) == 0:
            return False
        step = self.progress.step
        interval = self.spec.eval_interval or self.steps_per_epoch
        return self.progress.evaluated_step != step and (step % interval == 0 or step == self._until)

    def measure(self) -> Generator[None, None, Evaluation]:
        """The adapter of now on the held-out rows, at step 0 what it starts from: the mean loss per learned token."""
        step = self.progress.step
        if not step and self.start is not None:
            return self.start
        adapter = self.adapter if step or self.spec.init_path or not self.learning.begins_as_base else None
        found = yield from measure(
            *(self.host.queue, self.spec, self.corpus.valid, adapter),
            capacity=self.capacity,
            shared=self._shared[1],
            readout=self.learning.readout,
        )
        return found

    def _evaluate(self) -> Items:
        """Measure, write a checkpoint, tell, then save: a crash in between repeats it and changes nothing."""
        before, spec = self.progress, self.spec
        measured = yield from self.measure()
        found = self.learning.judge(measured, before.start_rows if before.step else None)
        self._watch.evaluation(before.step, measured.loss, found.loss)
        base_loss = before.base_loss if before.step else found.loss
        # The untrained adapter is the base, so the best checkpoint is one of those that follow.
        is_best = before.step > 0 and (before.best is None or found.loss < before.best.valid_loss)
        general = None
        if is_best or not before.step:
            trained = self.adapter if before.step else None
            general = yield from general_loss(self.host, spec, trained, capacity=self.capacity)
        tasks = self._tasks_of(found)
        path = None
        if before.step and self._checkpoints:
            path = write_checkpoint(spec, self.adapter, before.step, self.learning.heads())
        yield EvalEvent(
            run_id=spec.run_id,
            step=before.step,
            valid_loss=found.loss,
            valid_accuracy=found.accuracy,
            base_loss=base_loss,
            best=is_best,
            tasks=tasks,
            general_loss=general,
            metrics=found.metrics,
        )
        best = before.best
        if is_best:
            best = Best(
                step=before.step,
                valid_loss=found.loss,
                valid_accuracy=found.accuracy,
                path="" if path is None else str(path),
                rows=found.rows,
                probe=found.probe,
                tasks=tasks,
                general_loss=general,
                head=self.learning.outcome(found),
            )
        if path is not None and best is not None:
            yield self._checkpoint_event(path, found)
            prune_checkpoints(self.workdir, best.step, self.adapter.kept_checkpoints)
        base_general = before.base_general_loss if before.step else general
        self._evaluated(found, base_loss, base_general, best, is_best=is_best)
        self.save()

    def _evaluated(
        self, found: Evaluation, base_loss: float, base_general: float | None, best: Best | None, *, is_best: bool
    ) -> None:
        before = self.progress
        step = Evaluated(step=before.step, valid_loss=found.loss, valid_accuracy=found.accuracy, rows=found.rows)
        point = EvaluationPoint(step=before.step, valid_loss=found.loss, valid_accuracy=found.accuracy)
        self.progress = msgspec.structs.replace(
            before,
            evaluated_step=before.step,
            base_loss=base_loss,
            base_general_loss=base_general,
            last_loss=found.loss,
            best=best,
            stale=0 if is_best or not before.step else before.stale + 1,
            start_rows=before.start_rows if before.step else found.rows,
            row_tokens=found.tokens,
            curve=before.curve if self._checkpoints else [*before.curve, step],
            points=thinned([*before.points, point]),
            window_loss=0.0,
            window_correct=0.0,
            window_tokens=0,
        )

    def _tasks_of(self, found: Evaluation) -> dict[str, float]:
        """Held-out loss of each task, if there are several, in the unit of `valid_loss`."""
        names, task = self.corpus.names, self.corpus.valid_task
        if len(names) == 1:
            return {}
        losses = np.bincount(task, weights=np.array(found.examples), minlength=len(names))
        counts = np.bincount(task, weights=np.array(found.units), minlength=len(names)).tolist()
        return {name: float(losses[i] / max(counts[i], 1)) for i, name in enumerate(names)}

    def _checkpoint_event(self, path: Path, found: Evaluation) -> CheckpointEvent:
        tokens = max(self.progress.window_tokens, 1)
        return CheckpointEvent(
            run_id=self.spec.run_id,
            step=self.progress.step,
            path=str(path),
            train_loss=self.progress.window_loss / tokens,
            train_accuracy=self.progress.window_correct / tokens,
            valid_loss=found.loss,
            valid_accuracy=found.accuracy,
        )
