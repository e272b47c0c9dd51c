"""An engine without a model, in memory: it speaks the AsyncEngine protocol and does what the test tells it.

Its training runs write real PEFT directories, so everything behind the events is real.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tenora.adapters.peft_format import write_adapter
from tenora.adapters.ref import AdapterRef
from tenora.adapters.targets import TargetModule
from tenora.control.gate.held_out import held_out_rows
from tenora.engine.messages import EngineStats, Generate, Ready, SequenceOutput, TokenLogprob
from tenora.errors import UnavailableError
from tenora.training.methods.table import find_method
from tenora.training.spec import (
    CheckpointEvent,
    EvalEvent,
    FailedEvent,
    FinishedEvent,
    HeldOut,
    Recorded,
    RetoldEvent,
    StepEvent,
    StoppedEvent,
    TrainEvent,
    TrainSpec,
    TrialEvent,
    trial_of,
)

REWARDS = {"rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0}


class ScriptedEngine:
    """`steps` optimizer steps a run, the last one evaluated and kept. `hold` stops runs before that step."""

    def __init__(self, targets: Sequence[TargetModule], *, max_model_len: int = 256) -> None:
        self.targets = targets
        self.ready = Ready(
            device="cpu",
            dtype="float32",
            max_model_len=max_model_len,
            kv_blocks=64,
            block_size=16,
            target_modules=tuple(sorted({target.name for target in targets})),
            adapter_pool_bytes=512 * 2**20,
            adapter_slots=256,
        )
        self.stats = EngineStats()
        self._up = asyncio.Event()
        self.awaited = asyncio.Event()  # somebody waits, or waited, for it to be there
        self.alive = True
        self.healthy = True
        self.open_requests = 0
        self.last_heartbeat = time.monotonic()
        self.steps = 4
        self.winner = 1  # of a sweep
        self.loss = 0.5  # nats per token of results on held-out rows; adapters are served with 1, the base with 2
        self.reply: Callable[[Generate], list[SequenceOutput]] = lambda request: []
        self.score: Callable[[Generate], list[SequenceOutput]] = scores
        self.generated: list[Generate] = []
        self.scored: list[Generate] = []  # those that ask for no token
        self.aborted: list[str] = []
        self.pins: dict[str, bool] = {}
        self.evicted: list[str] = []
        self.forgotten: list[str] = []
        self.specs: list[TrainSpec] = []
        self.stops: list[tuple[str, bool]] = []
        self.acknowledged = 0  # events of runs that are recorded
        self.retold = 0  # how many of its first events a run says again when it is started, as one that is resumed
        self.hold_at: int | None = None
        self.held = asyncio.Event()  # a run waits before step `hold_at`
        self.release = asyncio.Event()
        self.in_flight = 0  # events of a run that are on their way when it is asked to end
        self.die_at: int | None = None
        self.fail_with: FailedEvent | None = None
        self.broken = False  # the finished run's adapter is not one of this base
        self._requested: dict[str, bool] = {}

    @property
    def alive(self) -> bool:
        return self._up.is_set()

    @alive.setter
    def alive(self, alive: bool) -> None:
        if alive:
            self._up.set()
        else:
            self._up.clear()

    async def wait_alive(self) -> None:
        self.awaited.set()
        await self._up.wait()

    async def generate(self, request: Generate, *, batch: int = 1) -> AsyncIterator[SequenceOutput]:
        scoring = request.sampling.max_tokens == 0
        (self.scored if scoring else self.generated).append(request)
        finished = False
        try:
            for output in self.score(request) if scoring else self.reply(request):
                await asyncio.sleep(0)
                finished = output.finish_reason is not None
                yield output
        finally:
            if not finished:
                self.aborted.append(request.request_id)

    async def train(self, spec: TrainSpec) -> AsyncIterator[TrainEvent]:
        self.specs.append(spec)
        self._requested.pop(spec.run_id, None)
        events = self._events(spec)
        recorded = [event for event in events if isinstance(event, Recorded)][: self.retold]
        if recorded:
            yield RetoldEvent(run_id=spec.run_id, events=recorded)
        for event in events[len(recorded) :]:
            if isinstance(event, StepEvent | TrialEvent) and event.step == self.hold_at:
                self.held.set()
                await self.release.wait()
            if isinstance(event, StepEvent) and event.step == self.die_at:
                self.die_at = None
                raise UnavailableError("The engine stopped.", code="engine_lost")
            if spec.run_id in self._requested and self.in_flight:
                self.in_flight -= 1
            elif spec.run_id in self._requested:
                yield StoppedEvent(run_id=spec.run_id, step=0, paused=self._requested.pop(spec.run_id))
                return
            await asyncio.sleep(0)
            yield event
            if isinstance(event, FailedEvent):
                return

    def _events(self, spec: TrainSpec) -> list[TrainEvent]:
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
            return [*events, self.fail_with]
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

    async def acknowledge(self, run_id: str, events: int) -> None:
        self.acknowledged += events

    async def stop_training(self, run_id: str, *, pause: bool = False) -> None:
        self.stops.append((run_id, pause))
        self._requested[run_id] = pause
        self.release.set()

    async def pin(self, ref: AdapterRef, pinned: bool = True) -> None:
        self.pins[ref.digest] = pinned

    async def evict(self, digest: str) -> None:
        self.evicted.append(digest)

    async def forget_prefixes(self, cache_salt: str) -> None:
        self.forgotten.append(cache_salt)


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


def scores(request: Generate, logprob: float | None = None) -> list[SequenceOutput]:
    """Every token of the prompt at `logprob`, by default -2 under the base and -1 under any adapter."""
    value = logprob if logprob is not None else -2.0 if request.adapter is None else -1.0
    first = request.sampling.prompt_logprobs_from
    found = [None if place < first else TokenLogprob(token, value) for place, token in enumerate(request.token_ids)]
    return [SequenceOutput(request_id=request.request_id, token_ids=[], prompt_logprobs=found, finish_reason="length")]


def outputs(
    request: Generate, ids: Sequence[int], *, chunk: int = 1, finish: str = "length", stop_token: int | None = None
) -> list[SequenceOutput]:
    """The engine's outputs for these tokens, `chunk` at a time, the last with a finish_reason."""
    pieces = [list(ids[start : start + chunk]) for start in range(0, len(ids), chunk)] or [[]]
    wanted = request.sampling.logprobs is not None
    return [
        SequenceOutput(
            request_id=request.request_id,
            token_ids=piece,
            logprobs=[TokenLogprob(token, -0.5, ((token, -0.5), (5, -2.0))) for token in piece] if wanted else None,
            cached_tokens=16 if index == 0 else 0,
            finish_reason=finish if index == len(pieces) - 1 else None,  # type: ignore[arg-type]  # a literal here
            stop_token_id=stop_token if index == len(pieces) - 1 else None,
        )
        for index, piece in enumerate(pieces)
    ]
