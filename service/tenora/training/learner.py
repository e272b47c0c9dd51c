"""One adapter in training: optimizer steps and evaluations in turn. It reads as a flat script.

A learner raises what goes wrong with it, and yields None where it waits for its rows to pass through the base. Runs
are made of learners: one for a plain job, one per trial of a sweep, one per fold of a cross-validation.
"""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from pathlib import Path

import msgspec
import numpy as np

from tenora.errors import TrainingError
from tenora.training.checkpoint import (
    Best,
    Evaluated,
    Progress,
    State,
    fingerprint,
    load_state,
    prune_checkpoints,
    save_state,
    thinned,
    write_checkpoint,
)
from tenora.training.commands import AdamWSettings
from tenora.training.corpus import Corpus
from tenora.training.evaluation import Evaluation, finish, general_loss, measure
from tenora.training.init_from import start_adapter
from tenora.training.objectives import MeanLoss, PreferenceLoss, RewardSums, row_sums
from tenora.training.optimizer import AdamW, clip_grad_norm
from tenora.training.packing import PackedRows, microbatches, shared_prefix
from tenora.training.pass_queue import Dropping, Work
from tenora.training.resident_base import TrainingHost
from tenora.training.schedule import learning_rate
from tenora.training.spec import CheckpointEvent, EvalEvent, EvaluationPoint, Items, Rewards, StepEvent, TrainSpec
from tenora.training.step import LoraDropout, TokenLosses

STATE_INTERVAL_SECONDS = 120.0
"""At most this much work is lost when the process is killed between two evaluations."""
_DIVERGED_NATS = 3.0  # above the start's loss, and
_DIVERGED_RATIO = 2.0  # times it, in
_DIVERGED_STEPS = 3  # steps on end: the run is beyond repair, and every further step would be wasted


class Learner:
    """One adapter between two boundaries of the engine.

    Weights, moments and `progress` change together, with no yield in between: whenever the learner is left,
    they are the state after the last whole step.

    Attributes:
        progress: how far it is.
        total_steps: of its schedule.
        start: the base on the held-out rows, if somebody has measured it for several learners.
    """

    def __init__(self, host: TrainingHost, spec: TrainSpec, corpus: Corpus, *, checkpoints: bool = True) -> None:
        """Make room for the adapter, and begin it or take up its saved state.

        Args:
            spec: of this adapter; its `workdir` is the learner's alone.
            checkpoints: write one at each evaluation. Otherwise the losses of all evaluations are kept row by row.

        Raises:
            TrainingError: the adapter cannot be, or the saved state is of another run or unreadable.
        """
        self.host, self.spec, self.corpus = host, spec, corpus
        self.workdir = Path(spec.workdir)
        self.steps_per_epoch = corpus.steps_per_epoch(spec.batch_size)
        self.total_steps = spec.max_steps or spec.n_epochs * self.steps_per_epoch
        self.adapter = host.arena.add(spec.lora)
        self.reference = None  # of DPO: the starting adapter, frozen
        try:
            self.adapter.initialise(spec.seed)
            if spec.init_path:
                start_adapter(self.adapter, Path(spec.init_path), host.arena.targets)
                if spec.method == "dpo":
                    self.reference = host.arena.add(spec.lora)
                    self.reference.weights.copy_(self.adapter.weights)
                    self.reference.refresh()
            self.optimizer = AdamW(self.adapter)
            rows = len(corpus.train) if spec.method == "dpo" else 0
            self.train_reference = np.full(rows, np.nan, np.float32)  # log π_ref of each row, once it was computed
            self.belongs_to = fingerprint(spec, corpus.train, corpus.valid)
            restored = load_state(self.workdir, self._state(Progress()))
        except BaseException:
            self.close()
            raise
        self.progress = restored or Progress()
        self.dropout = LoraDropout(spec.lora.dropout, host.decoder.device) if spec.lora.dropout else None
        self.capacity = host.part_tokens(spec.tokens_per_microbatch, recompute=spec.recompute_activations)
        self._shared = (0, 0)  # tokens that every row of the training and of the held-out rows begins with
        if host.shares_prefixes and spec.packing and not spec.lora.dropout:
            self._shared = (shared_prefix(corpus.train), shared_prefix(corpus.valid))
        self._checkpoints = checkpoints
        self.start: Evaluation | None = None
        self._until = self.total_steps
        self._high_steps = 0
        self.started = time.monotonic() - self.progress.seconds
        self.saved = time.monotonic()

    @property
    def stopped_early(self) -> bool:
        """Whether the held-out loss has not fallen for so many evaluations that the run asked to end."""
        return 0 < self.spec.early_stopping <= self.progress.stale

    def fit(self, until: int | None = None) -> Items:
        """Events and boundaries up to step `until`, evaluated, or to the end of the schedule.

        Without held-out rows nothing is evaluated, and no checkpoint is written.
        """
        self._until = self.total_steps if until is None else min(until, self.total_steps)
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
        save_state(self.workdir, self._state(self.progress, over=self._is_over()))
        self.saved = time.monotonic()

    def close(self) -> None:
        """Free the adapter's room."""
        self.adapter.remove()
        if self.reference is not None:
            self.reference.remove()

    def _is_over(self) -> bool:
        """Whether no step and no evaluation follow, and the best adapter was written."""
        now = self.progress
        written = self._checkpoints and now.best is not None and now.evaluated_step == now.step
        return written and (now.step >= self.total_steps or self.stopped_early)

    def _state(self, progress: Progress, *, over: bool = False) -> State:
        return State(self.optimizer, self.train_reference, progress, self.belongs_to, over)

    # ---- one optimizer step ---------------------------------------------------------------------------------------

    def _step(self) -> Items:
        step, spec, before = self.progress.step, self.spec, time.monotonic()
        examples = self.corpus.batch(step, spec.batch_size, seed=spec.seed)
        capacity = self.capacity if spec.packing else 1
        parts = microbatches(self.corpus.train, examples, capacity, shared=self._shared[0])
        count = sum(len(part.targets) for part in parts)
        rows = [row for part in parts for row in part.rows]
        if count == 0:
            raise TrainingError(
                f"Step {step + 1} has no learned token in any of {self.corpus.where(rows)}; remove these rows.",
                code="no_trainable_tokens",
            )
        if spec.method == "dpo":
            yield from self._refer(parts)
        work = self._work(parts, count)
        yield from finish(self.host.queue, work)
        self._check_finite(step, parts, work.results)
        loss, accuracy, rewards = self._losses(work, count)
        self._check_loss(loss, count, rows)
        norm = clip_grad_norm(self.adapter.grad, spec.max_grad_norm)
        if not math.isfinite(norm):
            raise self._not_finite(step, "gradient", rows)
        rate = learning_rate(
            step,
            peak=spec.learning_rate,
            total_steps=self.total_steps,
            warmup_ratio=spec.warmup_ratio,
            scheduler=spec.scheduler,
        )
        self.optimizer.step(AdamWSettings(learning_rate=rate, weight_decay=spec.weight_decay))
        self._advance(loss, accuracy, count)
        yield StepEvent(
            run_id=spec.run_id,
            step=step + 1,
            total_steps=self.total_steps,
            epoch=(step + 1) / self.steps_per_epoch,
            train_loss=loss,
            train_accuracy=accuracy,
            learning_rate=rate,
            grad_norm=norm,
            trained_tokens=self.progress.trained_tokens,
            tokens_per_second=sum(part.row_tokens for part in parts) / max(time.monotonic() - before, 1e-9),
            rewards=rewards,
        )

    def _work(self, parts: list[PackedRows], count: int) -> Work:
        spec, step = self.spec, self.progress.step
        objective: MeanLoss | PreferenceLoss = MeanLoss(count)
        if spec.method == "dpo":
            pairs = sum(len(part.rows) for part in parts) // 2
            objective = PreferenceLoss(spec.beta, pairs, self.train_reference)
        return Work(
            spec.run_id,
            spec.group,
            parts,
            self.adapter,
            objective,
            None if self.dropout is None else Dropping(self.dropout, spec.seed, step),
            weight=spec.weight,
            recompute=bool(spec.recompute_activations),
        )

    def _refer(self, parts: list[PackedRows]) -> Generator[None, None, None]:
        """Compute log π_ref of the rows that do not have it yet: the starting adapter's slot, on the same base."""
        missing = [part for part in parts if np.isnan(self.train_reference[list(part.rows)]).any()]
        spec = self.spec
        work = Work(spec.run_id, spec.group, missing, self.reference, weight=spec.weight)
        yield from finish(self.host.queue, work)
        for part, found in zip(missing, work.results, strict=True):
            self.train_reference[list(part.rows)] = -row_sums(part, found.loss).cpu().numpy()

    def _losses(self, work: Work, count: int) -> tuple[float, float, Rewards | None]:
        """Mean loss and accuracy of a step: per token, or for DPO per pair."""
        if isinstance(work.objective, PreferenceLoss):
            sums = RewardSums()
            for part, found in zip(work.parts, work.results, strict=True):
                sums.add(work.objective, part, found.loss)
            return sums.loss / sums.pairs, sums.correct / sums.pairs, sums.means
        loss = sum(float(found.loss.double().sum()) for found in work.results)
        return loss / count, sum(int(found.correct.sum()) for found in work.results) / count, None

    def _advance(self, loss: float, accuracy: float, count: int) -> None:
        now = self.progress
        self.progress = msgspec.structs.replace(
            now,
            step=now.step + 1,
            trained_tokens=now.trained_tokens + count,
            window_loss=now.window_loss + loss * count,
            window_correct=now.window_correct + accuracy * count,
            window_tokens=now.window_tokens + count,
        )

    def _check_finite(self, step: int, parts: list[PackedRows], results: list[TokenLosses]) -> None:
        for part, found in zip(parts, results, strict=True):
            finite = found.loss.isfinite().cpu().numpy()
            if not finite.all():
                raise self._not_finite(step, "loss", sorted({part.rows[row] for row in part.target_row[~finite]}))

    def _check_loss(self, loss: float, count: int, rows: list[int]) -> None:
        step = self.progress.step + 1
        if loss == 0.0 and self.spec.method == "supervised":
            raise TrainingError(
                f"The loss of step {step} is exactly 0 over {count} tokens: the rows are memorised or their answers "
                "are all alike; use fewer epochs, a lower learning rate or more varied rows.",
                code="zero_loss",
            )
        start = self.progress.base_loss
        known = self.progress.evaluated_step >= 0
        high = known and loss > start + _DIVERGED_NATS and loss > _DIVERGED_RATIO * start
        self._high_steps = self._high_steps + 1 if high else 0
        if self._high_steps >= _DIVERGED_STEPS:
            raise TrainingError(
                f"The run diverges: the loss of step {step} is {loss:.2f}, far above the start's "
                f"{start:.2f} for {_DIVERGED_STEPS} steps, in a batch with {self.corpus.where(rows)} of the training "
                "file; lower the learning rate.",
                code="diverged",
            )

    def _not_finite(self, step: int, what: str, rows: list[int]) -> TrainingError:
        return TrainingError(
            f"The {what} of step {step + 1} is not a finite number, in a batch with {self.corpus.where(rows)} of "
            "the training file; lower the learning rate, or look at these rows.",
            code="non_finite",
        )

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        if len(self.corpus.valid) == 0:
            return False
        step = self.progress.step
        interval = self.spec.eval_interval or self.steps_per_epoch
        return self.progress.evaluated_step != step and (step % interval == 0 or step == self._until)

    def measure(self) -> Generator[None, None, Evaluation]:
        """The adapter of now on the held-out rows; at step 0 what it starts from, which DPO is measured against."""
        step, dpo = self.progress.step, self.spec.method == "dpo"
        if not step and self.start is not None:
            return self.start
        start = self.adapter if self.spec.init_path else None
        reference = [-loss for loss in self.progress.start_rows] if dpo and step else None
        found = yield from measure(
            self.host.queue,
            self.spec,
            self.corpus.valid,
            self.adapter if step else start,
            capacity=self.capacity,
            shared=self._shared[1],
            reference=reference,
        )
        return found

    def _evaluate(self) -> Items:
        """Measure, write a checkpoint, tell, then save: a crash in between repeats it and changes nothing."""
        before, spec = self.progress, self.spec
        found = yield from self.measure()
        if not math.isfinite(found.loss):
            cause = f"after step {before.step}" if before.step else "of the base, before any step,"
            advice = "lower the learning rate" if before.step else "look at the validation rows"
            raise TrainingError(f"The held-out loss {cause} is not a finite number; {advice}.", code="non_finite")
        if spec.method == "dpo" and not before.step:
            # The start is its own reference: every margin is 0.
            found.loss, found.accuracy = math.log(2.0), 0.0
            found.rewards = Rewards(chosen=0.0, rejected=0.0, margin=0.0)
            found.pairs = [found.loss] * (len(found.rows) // 2)
        base_loss = before.base_loss if before.step else found.loss
        # The untrained adapter is the base, so the best checkpoint is one of those that follow.
        is_best = before.step > 0 and (before.best is None or found.loss < before.best.valid_loss)
        general = None
        if is_best or not before.step:
            measured = self.adapter if before.step else None
            general = yield from general_loss(self.host, spec, measured, capacity=self.capacity)
        tasks = self._tasks_of(found)
        path = write_checkpoint(spec, self.adapter, before.step) if before.step and self._checkpoints else None
        yield EvalEvent(
            run_id=spec.run_id,
            step=before.step,
            valid_loss=found.loss,
            valid_accuracy=found.accuracy,
            base_loss=base_loss,
            best=is_best,
            tasks=tasks,
            general_loss=general,
            rewards=found.rewards,
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
            )
        if path is not None and best is not None:
            yield self._checkpoint_event(path, found)
            prune_checkpoints(self.workdir, best.step)
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
        """Held-out loss of each task, if there are several: per learned token, for DPO per pair, as `valid_loss` is."""
        names, task = self.corpus.names, self.corpus.valid_task
        if len(names) == 1:
            return {}
        sums, counts = (found.pairs, [1] * len(task)) if found.pairs else (found.rows, found.tokens)
        losses = np.bincount(task, weights=np.array(sums), minlength=len(names))
        counts = np.bincount(task, weights=np.array(counts), minlength=len(names)).tolist()
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
