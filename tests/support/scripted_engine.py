"""An engine without a model behind everything else that is real: its client, its protocol, its loop.

It speaks a given text, or counts, and does what the test says: hangs, dies, fails, holds. Of runs it has the events.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tenora.adapters.ref import AdapterRef
from tenora.engine.messages import (
    Abort,
    Acknowledge,
    Command,
    EngineStats,
    Event,
    EvictAdapter,
    Generate,
    Outputs,
    PinAdapter,
    Ready,
    SequenceFailed,
    SequenceOutput,
    StartTraining,
    StopTraining,
    TokenLogprob,
    Training,
)
from tenora.training.spec import StepEvent, StoppedEvent, TrainEvent, TrainSpec
from tests.support.patience import PATIENCE

CRASH = 666  # while it counts, a prompt that begins with it kills the engine
FAIL = 404  # … is answered by a failure whose code is the group
SILENT = 111  # … is never answered

READY = Ready(
    device="cpu",
    dtype="float32",
    max_model_len=512,
    kv_blocks=32,
    block_size=16,
    target_modules=("q_proj", "v_proj"),
    adapter_pool_bytes=512 * 2**20,
    adapter_slots=256,
)


@dataclass
class Script:
    """What the engine says, and what it was told. Shared with the test's thread.

    Attributes:
        tokens: every sequence generates these, over and over; None counts upwards from the prompt's last token, and a
            prompt may then begin with one of the words above.
        hold_after: a sequence stops giving tokens after this many, and goes on only when this changes.
        fail_after: a sequence fails with `fail_code` after this many tokens.
        hang: while set, the loop hangs inside a step, until `released`.
        alternatives: the likeliest tokens at each place, after the one that is generated.
        training: the events of a training run; without them a run waits to be stopped.
        makes_steps: without `training`, a run makes an optimizer step with each step of the engine.
    """

    tokens: Sequence[int] | None = (5,)
    hold_after: int | None = None
    fail_after: int | None = None
    fail_code: str = "engine_error"
    alternatives: Sequence[int] = (7, 8, 9)
    training: Callable[[TrainSpec], Sequence[TrainEvent]] | None = None
    makes_steps: bool = False

    def __post_init__(self) -> None:
        self.changed = threading.Condition()
        self.requests: list[Generate] = []
        self.aborted: list[str] = []
        self.pins: list[tuple[AdapterRef, bool]] = []
        self.evicted: list[str] = []
        self.stopped: list[tuple[str, bool]] = []
        self.acknowledged: dict[str, int] = {}
        self.hang = threading.Event()
        self.released = threading.Event()

    @classmethod
    def counting(cls) -> Script:
        """Counts upwards, and makes steps of runs until they are stopped."""
        return cls(tokens=None, makes_steps=True)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to be true of what the engine, in its thread, was told."""

        def wait() -> bool:
            with self.changed:
                return self.changed.wait_for(condition, PATIENCE)

        assert await asyncio.to_thread(wait), "the engine was not told in time"


class ScriptedEngine:
    """One token a step for every sequence, as the script has it.

    Attributes:
        running: of each sequence that generates, its request and how many tokens it has had.
        runs: of each run that is neither stopped nor scripted, how many steps it has made.
        pending: what it says next.
    """

    def __init__(self, script: Script, wake: Callable[[], None]) -> None:
        self.ready = READY
        self.script = script
        self.wake = wake
        self.running: dict[str, tuple[Generate, int]] = {}
        self.runs: dict[str, int] = {}
        self.pending: list[Event] = []
        self.generated = 0

    @property
    def has_work(self) -> bool:
        trains = self.script.makes_steps and self.runs
        return bool(self.pending or trains) or any(not self._held(done) for _, done in self.running.values())

    def add(self, command: Command) -> None:
        self._take(command)
        with self.script.changed:
            self.script.changed.notify_all()

    def _take(self, command: Command) -> None:
        script = self.script
        match command:
            case Generate():
                script.requests.append(command)
                self._begin(command)
            case Abort(request_id=request_id):
                script.aborted.append(request_id)
                self.running.pop(request_id, None)
            case StartTraining(spec=spec) if script.training is not None:
                self.pending += [Training(event) for event in script.training(spec)]
            case StartTraining(spec=spec):
                self.runs[spec.run_id] = 0
            case Acknowledge(run_id=run_id, count=count):
                script.acknowledged[run_id] = count
            case StopTraining(run_id=run_id, pause=pause):
                script.stopped.append((run_id, pause))
                if run_id in self.runs:
                    step = self.runs.pop(run_id)
                    self.pending.append(Training(StoppedEvent(run_id=run_id, step=step, paused=pause)))
            case PinAdapter(adapter=ref, pinned=pinned):
                script.pins.append((ref, pinned))
            case EvictAdapter(digest=digest):
                script.evicted.append(digest)

    def _begin(self, request: Generate) -> None:
        word = request.token_ids[0] if self.script.tokens is None else None
        if word == CRASH:
            raise RuntimeError("crash")
        if word == FAIL:
            failed = SequenceFailed(request_id=request.request_id, code=request.share_group, message="no")
            self.pending.append(Outputs([failed]))
        elif word != SILENT:
            self.running[request.request_id] = (request, 0)

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
        if items:
            events.append(Outputs(items))
        if self.script.makes_steps:
            for run_id in self.runs:
                self.runs[run_id] += 1
                events.append(Training(step_event(run_id, self.runs[run_id])))
        return events

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
        failed = [SequenceFailed(request_id=name, code="engine_shutdown", message="bye") for name in self.running]
        stopped = [Training(StoppedEvent(run_id=run, step=step, paused=True)) for run, step in self.runs.items()]
        return [Outputs([*failed]), *stopped]

    def _held(self, done: int) -> bool:
        return self.script.hold_after is not None and done >= self.script.hold_after

    def _next(self, request: Generate, done: int) -> SequenceOutput:
        tokens = self.script.tokens
        token = request.token_ids[-1] + done + 1 if tokens is None else tokens[done % len(tokens)]
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


def step_event(run_id: str, step: int) -> StepEvent:
    """An optimizer step of a run whose length nobody asks for."""
    return StepEvent(
        run_id=run_id,
        step=step,
        total_steps=0,
        epoch=0.0,
        train_loss=1.0,
        train_accuracy=0.0,
        learning_rate=0.1,
        grad_norm=1.0,
        trained_tokens=step,
        tokens_per_second=1.0,
    )
