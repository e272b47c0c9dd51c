"""What training runs of jobs say and write: real PEFT directories, so that everything behind the events is real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from tenora.adapters.peft_format import write_adapter
from tenora.adapters.targets import TargetModule
from tenora.control.gate.held_out import held_out_rows
from tenora.engine.messages import Generate
from tenora.training.events import (
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    HeldOut,
    StepEvent,
    TrainEvent,
    TrialEvent,
)
from tenora.training.methods.table import find_method
from tenora.training.spec import TrainSpec, trial_of
from tests.support.scripted_answers import scores
from tests.support.scripted_engine import READY, Answer, Script

REWARDS = {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0}


class JobScript(Script):
    """Runs of `steps` optimizer steps, the last one evaluated and kept; sequences that come to what the test wants.

    Attributes:
        winner: the best trial of a sweep.
        loss: nats per token of results on held-out rows; adapters are served with 1, the base with 2.
        reply: what requests for tokens are answered.
        score: what requests that ask for no token are answered.
        fail_with: code and message of the failure that runs end with.
        broken: the adapters that runs write cannot be read.
    """

    def __init__(self, targets: Sequence[TargetModule], *, max_model_len: int = 256) -> None:
        names = tuple(sorted({target.name for target in targets}))
        super().__init__(
            ready=msgspec.structs.replace(READY, max_model_len=max_model_len, kv_blocks=64, target_modules=names),
            answer=lambda request: self.score(request) if request.sampling.max_tokens == 0 else self.reply(request),
            training=self.events,
        )
        self.targets = targets
        self.steps = 4
        self.winner = 1
        self.loss = 0.5
        self.reply: Callable[[Generate], Answer] = lambda request: []
        self.score: Callable[[Generate], Answer] = scores
        self.fail_with: tuple[str, str] | None = None
        self.broken = False

    def events(self, spec: TrainSpec) -> list[TrainEvent]:
        total, run = self.steps, spec.run_id
        path = Path(spec.workdir) / "checkpoints" / f"step-{total:06d}"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.write(path, spec)
        evaluation: dict[str, Any] = {"valid_loss": 1.5, "valid_accuracy": 0.6, "base_loss": 3.0}
        if len(spec.tasks) > 1:
            evaluation["tasks"] = {task.name: 1.0 + index for index, task in enumerate(spec.tasks)}
        if spec.trials:
            return [*self._trials(spec), self._finished(spec, path, evaluation)]
        metrics = REWARDS if find_method(spec.method).has_reference else {}
        events: list[TrainEvent] = [EvalEvent(run_id=run, step=0, best=False, **{**evaluation, "valid_loss": 3.0})]
        events += [
            StepEvent(
                run_id=run,
                step=step,
                total_steps=total,
                epoch=step / total,
                train_loss=3.0 - step / 4,
                train_accuracy=0.5,
                learning_rate=spec.learning_rate,
                grad_norm=float("nan") if step == 1 else 1.0,
                trained_tokens=step * 10,
                tokens_per_second=100.0,
                metrics=metrics,
            )
            for step in range(1, total + 1)
        ]
        if self.fail_with is not None:
            code, message = self.fail_with
            return [*events, FailedEvent(run_id=run, code=code, message=message)]
        return [
            *events,
            EvalEvent(run_id=run, step=total, best=True, metrics=metrics, **evaluation),
            CheckpointEvent(
                run_id=run,
                step=total,
                path=str(path),
                train_loss=2.0,
                train_accuracy=0.5,
                valid_loss=1.5,
                valid_accuracy=0.6,
            ),
            self._finished(spec, path, evaluation),
        ]

    def _finished(self, spec: TrainSpec, path: Path, evaluation: dict[str, Any]) -> FinishedEvent:
        return FinishedEvent(
            run_id=spec.run_id,
            path=str(path),
            step=self.steps,
            steps=self.steps,
            trained_tokens=self.steps * 10,
            seconds=1.0,
            trial=self.winner if spec.trials else None,
            held_out=self.held_out(spec),
            **evaluation,
        )

    def held_out(self, spec: TrainSpec) -> HeldOut:
        """The same loss for each learned token, but of rejected answers six times as much."""
        rows = held_out_rows(spec)
        tokens = [int(rows.row(row)[1].sum()) for row in range(len(rows))]
        worse = [6.0 if row % rows.rows_per_example else 1.0 for row in range(len(rows))]
        return HeldOut(
            tokens=tokens,
            adapter=[self.loss * factor * count for factor, count in zip(worse, tokens, strict=True)],
            start=[3.0 * count for count in tokens],
        )

    def _trials(self, spec: TrainSpec) -> list[TrialEvent]:
        """The first half of each trial's steps; then trial 0 fails, the winner finishes, the others are stopped."""
        total, last = self.steps, len(spec.trials) - 1
        losses = {trial: 1.5 if trial == self.winner else 2.0 + trial for trial in range(last + 1)}
        half = [
            TrialEvent(
                run_id=spec.run_id,
                trial=trial,
                status="running",
                step=total // 2,
                total_steps=total,
                trained_tokens=(trial + 1) * 10,
                valid_loss=loss,
            )
            for trial, loss in losses.items()
        ]
        return half + [
            TrialEvent(
                run_id=spec.run_id,
                trial=trial,
                status="finished" if trial == self.winner else "failed" if trial == 0 else "stopped",
                step=total if trial == self.winner else total // 2,
                total_steps=total,
                trained_tokens=last * 10 + (trial + 1) * 10,
                valid_loss=float("nan") if trial == 0 else loss,
                reason="The loss is not finite." if trial == 0 else "",
            )
            for trial, loss in losses.items()
        ]

    def write(self, path: Path, spec: TrainSpec) -> None:
        lora = (trial_of(spec, self.winner) if spec.trials else spec).lora
        modules = random_modules(
            self.targets, lora.target_modules, lora.rank, spec.seed + round(spec.learning_rate * 1e9)
        )
        write_adapter(path, base_model=spec.base_model, lora=lora, modules=modules)
        if self.broken:
            (path / "adapter_model.safetensors").chmod(0o600)
            (path / "adapter_model.safetensors").write_bytes(b"not tensors")


def random_modules(
    targets: Sequence[TargetModule], names: Sequence[str], rank: int, seed: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Float32 A [rank, in] and B [out, rank] of every such module."""
    random = np.random.default_rng(seed)
    return {
        target.path: (
            random.normal(size=(rank, target.in_features)).astype(np.float32),
            random.normal(size=(target.out_features, rank)).astype(np.float32),
        )
        for target in targets
        if target.name in names
    }
