"""An engine without a model: what AsyncEngine does when the other side behaves well, dies, or says no."""

from __future__ import annotations

import threading
from collections.abc import Callable

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
    Training,
)
from tenora.training.spec import StepEvent, StoppedEvent

CRASH = 666  # a prompt that begins with it kills the engine
FAIL = 404  # … is answered by a failure whose code is the group
SILENT = 111  # … is never answered

READY = Ready(
    device="cpu",
    dtype="float32",
    max_model_len=128,
    kv_blocks=8,
    block_size=16,
    target_modules=("q_proj", "v_proj"),
    adapter_pool_bytes=2**20,
    adapter_slots=8,
)


class FakeEngine:
    """Counts upwards from the prompt's last token, one token a step. A run gives a StepEvent a step until stopped."""

    def __init__(self, wake: Callable[[], None]) -> None:
        self.ready = READY
        self.wake = wake
        self.requests: dict[str, list[int]] = {}
        self.limits: dict[str, int] = {}
        self.runs: dict[str, int] = {}
        self.events: list[Event] = []
        self.aborted: list[str] = []
        self.pins: list[tuple[AdapterRef, bool]] = []
        self.evicted: list[str] = []
        self.stopped: list[tuple[str, bool]] = []
        self.acknowledged: dict[str, int] = {}
        self.hang = threading.Event()
        self.resume = threading.Event()
        self.changed = threading.Event()

    @property
    def has_work(self) -> bool:
        return bool(self.requests or self.runs or self.events)

    def add(self, command: Command) -> None:
        match command:
            case Generate():
                self._generate(command)
            case Abort(request_id=request_id):
                self.aborted.append(request_id)
                self.requests.pop(request_id, None)
            case StartTraining(spec=spec):
                self.runs[spec.run_id] = 0
            case Acknowledge(run_id=run_id, count=count):
                self.acknowledged[run_id] = count
            case StopTraining(run_id=run_id, pause=pause):
                self.stopped.append((run_id, pause))
                if run_id in self.runs:
                    step = self.runs.pop(run_id)
                    self.events.append(Training(StoppedEvent(run_id=run_id, step=step, paused=pause)))
            case PinAdapter(adapter=ref, pinned=pinned):
                self.pins.append((ref, pinned))
            case EvictAdapter(digest=digest):
                self.evicted.append(digest)
        self.changed.set()

    def step(self) -> list[Event]:
        if self.hang.is_set():
            self.resume.wait()
        events, self.events = self.events, []
        items: list[SequenceOutput | SequenceFailed] = []
        for request_id, tokens in list(self.requests.items()):
            tokens.append(tokens[-1] + 1)
            self.limits[request_id] -= 1
            done = self.limits[request_id] == 0
            items.append(
                SequenceOutput(request_id=request_id, token_ids=[tokens[-1]], finish_reason="length" if done else None)
            )
            if done:
                del self.requests[request_id]
        if items:
            events.append(Outputs(items))
        for run_id in self.runs:
            self.runs[run_id] += 1
            events.append(Training(_step_event(run_id, self.runs[run_id])))
        return events

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self.requests), training_runs=len(self.runs))

    def shutdown(self) -> list[Event]:
        items: list[SequenceOutput | SequenceFailed] = [
            SequenceFailed(request_id=request_id, code="engine_shutdown", message="bye") for request_id in self.requests
        ]
        runs: list[Event] = [Training(StoppedEvent(run_id=r, step=s, paused=True)) for r, s in self.runs.items()]
        return [Outputs(items), *runs]

    def _generate(self, request: Generate) -> None:
        match request.token_ids[0]:
            case 666:
                raise RuntimeError("crash")
            case 404:
                failed = SequenceFailed(request_id=request.request_id, code=request.group, message="no")
                self.events.append(Outputs([failed]))
            case 111:
                return
            case _:
                self.requests[request.request_id] = list(request.token_ids)
                self.limits[request.request_id] = request.sampling.max_tokens


def _step_event(run_id: str, step: int) -> StepEvent:
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
