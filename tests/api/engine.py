"""An engine that speaks a given text: the API is tested over the real AsyncEngine and Control without a model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenora.engine.messages import (
    Abort,
    Command,
    EngineStats,
    Event,
    Generate,
    Outputs,
    Ready,
    SequenceFailed,
    SequenceOutput,
    StartTraining,
    StopTraining,
    TokenLogprob,
    Training,
)
from tenora.training.spec import StoppedEvent, TrainEvent, TrainSpec
from tests.support.patience import PATIENCE

CONTEXT = 512


@dataclass
class Script:
    """What the engine says, and what it was told. Shared with the test's thread.

    Attributes:
        tokens: every sequence generates these, over and over.
        hold_after: a sequence stops giving tokens after this many, and goes on only when this changes.
        fail_after: a sequence fails with `fail_code` after this many tokens.
        hang: while set, the loop hangs inside a step.
        alternatives: the likeliest tokens at each place, after the one that is generated.
        training: the events of a training run; without them a run starts and waits to be stopped.
    """

    tokens: Sequence[int] = (5,)
    hold_after: int | None = None
    fail_after: int | None = None
    fail_code: str = "engine_error"
    alternatives: Sequence[int] = (7, 8, 9)
    training: Callable[[TrainSpec], Sequence[TrainEvent]] | None = None

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.requests: list[Generate] = []
        self.aborted: list[str] = []
        self.hang = threading.Event()
        self.released = threading.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to be true of what the engine, in its thread, was told."""

        def wait() -> bool:
            with self.changed:
                return self.changed.wait_for(condition, PATIENCE)

        assert await asyncio.to_thread(wait), "the engine was not told in time"


class ScriptedEngine:
    """One token a step for every sequence. Training runs start and wait to be stopped."""

    def __init__(self, script: Script, wake: Callable[[], None]) -> None:
        self.script = script
        self.wake = wake
        self.running: dict[str, tuple[Generate, int]] = {}
        self.runs: set[str] = set()
        self.pending: list[Event] = []
        self.generated = 0
        self.ready = Ready(
            device="cpu",
            dtype="float32",
            max_model_len=CONTEXT,
            kv_blocks=32,
            block_size=16,
            target_modules=("q_proj", "v_proj"),
            adapter_pool_bytes=512 * 2**20,
            adapter_slots=256,
        )

    @property
    def has_work(self) -> bool:
        return bool(self.pending) or any(not self._held(done) for _, done in self.running.values())

    def add(self, command: Command) -> None:
        self._take(command)
        with self.script.changed:
            self.script.changed.notify_all()

    def _take(self, command: Command) -> None:
        match command:
            case Generate():
                self.script.requests.append(command)
                self.running[command.request_id] = (command, 0)
            case Abort(request_id=request_id):
                self.script.aborted.append(request_id)
                self.running.pop(request_id, None)
            case StartTraining(spec=spec) if self.script.training is not None:
                self.pending += [Training(event) for event in self.script.training(spec)]
            case StartTraining(spec=spec):
                self.runs.add(spec.run_id)
            case StopTraining(run_id=run_id, pause=pause) if run_id in self.runs:
                self.runs.discard(run_id)
                self.pending.append(Training(StoppedEvent(run_id=run_id, step=0, paused=pause)))

    def step(self) -> list[Event]:
        if self.script.hang.is_set():
            self.script.released.wait()
        events, self.pending = self.pending, []
        items: list[SequenceOutput | SequenceFailed] = []
        for request_id, (request, done) in list(self.running.items()):
            if self.script.fail_after is not None and done >= self.script.fail_after:
                items.append(SequenceFailed(request_id=request_id, code=self.script.fail_code, message="It failed."))
                del self.running[request_id]
            elif not self._held(done):
                items.append(self._next(request, done))
        return [*events, Outputs(items)] if items else events

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running),
            kv_blocks_total=32,
            kv_blocks_used=8,
            generation_tokens=self.generated,
            adapter_slots=4,
            adapters_running=("ab" * 32,),
            training_runs=len(self.runs),
        )

    def shutdown(self) -> list[Event]:
        return [Training(StoppedEvent(run_id=run, step=0, paused=True)) for run in self.runs]

    def _held(self, done: int) -> bool:
        return self.script.hold_after is not None and done >= self.script.hold_after

    def _next(self, request: Generate, done: int) -> SequenceOutput:
        token = self.script.tokens[done % len(self.script.tokens)]
        sampling = request.sampling
        self.generated += 1
        ended = sampling.max_tokens is not None and done + 1 >= sampling.max_tokens
        self.running[request.request_id] = (request, done + 1)
        if ended:
            del self.running[request.request_id]
        prompt = None
        if done == 0 and sampling.prompt_logprobs is not None:
            first = sampling.prompt_logprobs_from
            scored = [self._logprob(token_id, sampling.prompt_logprobs) for token_id in request.token_ids[first:]]
            prompt = [None] * first + scored
        return SequenceOutput(
            request_id=request.request_id,
            token_ids=[token] if sampling.max_tokens != 0 else [],  # 0 scores the prompt
            logprobs=None if sampling.logprobs is None else [self._logprob(token, sampling.logprobs)],
            prompt_logprobs=prompt,
            cached_tokens=3 if done == 0 else 0,
            finish_reason="length" if ended else None,
        )

    def _logprob(self, token: int, count: int) -> TokenLogprob:
        others = (other for other in self.script.alternatives if other != token)
        top = tuple((other, -0.5 - rank) for rank, other in enumerate((token, *others)[:count]))
        return TokenLogprob(token_id=token, logprob=-0.5, top=top)
