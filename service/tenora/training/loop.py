"""What a training run does: optimizer steps and evaluations in turn, until the end. It reads as a flat script."""

from __future__ import annotations

import math
import time
from collections.abc import Generator
from pathlib import Path

import msgspec

from tenora.errors import TrainingError
from tenora.model.decoder import Decoder
from tenora.model.spec import target_modules
from tenora.training.checkpoint import (
    Best,
    Progress,
    fingerprint,
    load_state,
    prune_checkpoints,
    save_state,
    write_checkpoint,
)
from tenora.training.dataset import TokenizedDataset
from tenora.training.evaluation import Evaluation, evaluate
from tenora.training.optimizer import AdamW, clip_grad_norm
from tenora.training.packing import Int64Array, epoch_batches, microbatches, steps_per_epoch
from tenora.training.schedule import learning_rate
from tenora.training.slots import TrainingSlots
from tenora.training.spec import CheckpointEvent, EvalEvent, FinishedEvent, StepEvent, TrainEvent, TrainSpec
from tenora.training.step import Dropout, LoraDropout, activation_bytes_per_token, forward_backward, load_microbatch

STATE_INTERVAL_SECONDS = 120.0
"""At most this much work is lost when the process is killed between two evaluations."""
# Of a microbatch whose graphs are kept. On a CPU larger ones are no faster (measured from 200 to 760 tokens of
# SmolLM2-135M), they only hold the pass longer between two boundaries.
_ACTIVATION_BYTES = {"cpu": 2**30, "cuda": 8 * 2**30}
_SLOT = 0

Items = Generator[TrainEvent | None, None, None]


class TrainingLoop:
    """One run between two boundaries of the engine. It raises; `TrainingRun` turns that into events.

    Weights, moments and `progress` change together, with no yield in between: whenever the loop is left, they are the
    state after the last whole step.

    Attributes:
        progress: how far the run is.
    """

    def __init__(self, decoder: Decoder, spec: TrainSpec) -> None:
        self.decoder, self.spec = decoder, spec
        self.workdir = Path(spec.workdir)
        self.train, self.valid = _load_rows(spec.train_path, "training"), _load_rows(spec.valid_path, "validation")
        self.belongs_to = fingerprint(spec, self.train, self.valid)
        self.steps_per_epoch = steps_per_epoch(len(self.train), spec.batch_size)
        self.orders: dict[int, list[Int64Array]] = {}
        self.total_steps = spec.max_steps or spec.n_epochs * self.steps_per_epoch
        self.slots = TrainingSlots(target_modules(decoder.spec), [spec.lora], device=decoder.device)
        self.optimizer = AdamW(self.slots.weights(_SLOT), self.slots.grad(_SLOT), weight_decay=spec.weight_decay)
        self.dropout = LoraDropout(spec.lora.dropout, decoder.device) if spec.lora.dropout else None
        per_token = activation_bytes_per_token(decoder.spec, decoder.dtype.itemsize)
        budget = _ACTIVATION_BYTES.get(decoder.device.type, _ACTIVATION_BYTES["cpu"])
        self.kept_tokens = max(1, budget // per_token)
        self.capacity = min(spec.tokens_per_microbatch, self.kept_tokens)
        restored = load_state(self.workdir, self.optimizer, self.belongs_to)
        if restored is None:
            self.slots.initialise(_SLOT, spec.seed)
        self.progress = restored or Progress()
        self.started = time.monotonic() - self.progress.seconds
        self.saved = time.monotonic()

    def items(self) -> Items:
        """Events and boundaries up to the FinishedEvent."""
        while True:
            if self._evaluation_is_due():
                yield from self._evaluate()
            if self.progress.step >= self.total_steps:
                break
            yield from self._step()
            if time.monotonic() - self.saved > STATE_INTERVAL_SECONDS:
                self.save()
        yield self._finished()

    def save(self) -> None:
        """Write the state after the last whole step."""
        self.progress = msgspec.structs.replace(self.progress, seconds=time.monotonic() - self.started)
        save_state(self.workdir, self.optimizer, self.progress, self.belongs_to)
        self.saved = time.monotonic()

    # ---- one optimizer step ---------------------------------------------------------------------------------------

    def _step(self) -> Items:
        step, spec, before = self.progress.step, self.spec, time.monotonic()
        rows = self._rows_of(step)
        packed = microbatches(self.train, rows, self.capacity)
        count = sum(len(batch.targets) for batch in packed)
        if count == 0:
            raise TrainingError(
                f"Step {step + 1} has no learned token in any of {self._lines(rows)}; remove these rows.",
                code="no_trainable_tokens",
            )
        self.optimizer.zero_grad()
        loss, correct = 0.0, 0
        for number, batch in enumerate(packed):
            dropout = None if self.dropout is None else Dropout(self.dropout, spec.seed, step, number)
            found = yield from forward_backward(
                self.decoder,
                load_microbatch(self.decoder, batch, self.slots.tables, slot=_SLOT, dropout=dropout),
                scale=1.0 / count,
                keep_graphs=batch.tokens <= self.kept_tokens,
                dropout=dropout,
            )
            finite = found.loss.isfinite().cpu().numpy()
            if not finite.all():
                bad = sorted({batch.rows[index] for index in batch.target_row[~finite]})
                raise self._not_finite(step, "loss", bad)
            loss += float(found.loss.double().sum())
            correct += int(found.correct.sum())
        self._check_loss(loss, count)
        norm = clip_grad_norm(self.optimizer.grad, spec.max_grad_norm)
        if not math.isfinite(norm):
            raise self._not_finite(step, "gradient", rows)
        rate = learning_rate(
            step,
            peak=spec.learning_rate,
            total_steps=self.total_steps,
            warmup_ratio=spec.warmup_ratio,
            scheduler=spec.scheduler,
        )
        self.optimizer.step(rate)
        self._advance(loss, correct, count)
        tokens = sum(batch.tokens for batch in packed)
        yield StepEvent(
            run_id=spec.run_id,
            step=step + 1,
            total_steps=self.total_steps,
            epoch=(step + 1) / self.steps_per_epoch,
            train_loss=loss / count,
            train_accuracy=correct / count,
            learning_rate=rate,
            grad_norm=norm,
            trained_tokens=self.progress.trained_tokens,
            tokens_per_second=tokens / max(time.monotonic() - before, 1e-9),
        )

    def _rows_of(self, step: int) -> list[int]:
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch not in self.orders:  # drawn once an epoch: a large file has many rows and many steps
            order = epoch_batches(len(self.train), self.spec.batch_size, seed=self.spec.seed, epoch=epoch)
            self.orders = {epoch: order}
        rows: list[int] = self.orders[epoch][index].tolist()
        return rows

    def _advance(self, loss: float, correct: int, count: int) -> None:
        now = self.progress
        self.progress = msgspec.structs.replace(
            now,
            step=now.step + 1,
            trained_tokens=now.trained_tokens + count,
            window_loss=now.window_loss + loss,
            window_correct=now.window_correct + correct,
            window_tokens=now.window_tokens + count,
        )

    def _check_loss(self, loss: float, count: int) -> None:
        if loss == 0.0:
            raise TrainingError(
                f"The loss of step {self.progress.step + 1} is exactly 0 over {count} tokens: the rows are memorised "
                "or their answers are all alike; use fewer epochs, a lower learning rate or more varied rows.",
                code="zero_loss",
            )

    def _not_finite(self, step: int, what: str, rows: list[int]) -> TrainingError:
        return TrainingError(
            f"The {what} of step {step + 1} is not a finite number, in a batch with {self._lines(rows)} of "
            "the training file; lower the learning rate, or look at these rows.",
            code="non_finite",
        )

    def _lines(self, rows: list[int]) -> str:
        lines = sorted(int(self.train.lines[row]) for row in rows)
        shown = ", ".join(map(str, lines[:16])) + (f" and {len(lines) - 16} more" if len(lines) > 16 else "")
        return f"line{'s' if len(lines) > 1 else ''} {shown}"

    # ---- evaluation -----------------------------------------------------------------------------------------------

    def _evaluation_is_due(self) -> bool:
        step = self.progress.step
        interval = self.spec.eval_interval or self.steps_per_epoch
        return self.progress.evaluated_step != step and (step % interval == 0 or step == self.total_steps)

    def _evaluate(self) -> Items:
        """Measure, write a checkpoint, tell, then save: a crash in between repeats it and changes nothing."""
        before, spec = self.progress, self.spec
        tables = self.slots.tables if before.step else None
        found = yield from evaluate(self.decoder, self.valid, tables, capacity=self.capacity, slot=_SLOT)
        if not math.isfinite(found.loss):
            cause = f"after step {before.step}" if before.step else "of the base, before any step,"
            advice = "lower the learning rate" if before.step else "look at the validation rows"
            raise TrainingError(f"The held-out loss {cause} is not a finite number; {advice}.", code="non_finite")
        base_loss = before.base_loss if before.step else found.loss
        # The untrained adapter is the base, so the best checkpoint is one of those that follow.
        is_best = before.step > 0 and (before.best is None or found.loss < before.best.valid_loss)
        path = write_checkpoint(spec, self.slots, before.step) if before.step else None
        yield EvalEvent(
            run_id=spec.run_id,
            step=before.step,
            valid_loss=found.loss,
            valid_accuracy=found.accuracy,
            base_loss=base_loss,
            best=is_best,
        )
        best = before.best
        if path is not None:
            yield self._checkpoint_event(path, found)
            if is_best or best is None:
                best = Best(step=before.step, valid_loss=found.loss, valid_accuracy=found.accuracy, path=str(path))
            prune_checkpoints(self.workdir, best.step)
        self.progress = msgspec.structs.replace(
            before,
            evaluated_step=before.step,
            base_loss=base_loss,
            best=best,
            window_loss=0.0,
            window_correct=0,
            window_tokens=0,
        )
        self.save()

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

    def _finished(self) -> FinishedEvent:
        best = self.progress.best
        if best is None:
            raise TrainingError("The run has no step to make; set n_epochs or max_steps above 0.", code="no_steps")
        return FinishedEvent(
            run_id=self.spec.run_id,
            path=best.path,
            step=best.step,
            steps=self.progress.step,
            valid_loss=best.valid_loss,
            valid_accuracy=best.valid_accuracy,
            base_loss=self.progress.base_loss,
            trained_tokens=self.progress.trained_tokens,
            seconds=time.monotonic() - self.started,
        )


def _load_rows(path: str, kind: str) -> TokenizedDataset:
    dataset = TokenizedDataset.load(Path(path))
    if dataset.num_trained == 0:
        raise TrainingError(
            f"The {kind} rows hold no token to learn from: {len(dataset)} rows, {dataset.num_tokens} tokens, none of "
            "them in an assistant message or completion that counts; add such rows.",
            code="no_trainable_tokens",
        )
    return dataset
