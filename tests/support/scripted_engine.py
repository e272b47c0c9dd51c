"""An engine without a model behind everything else that is real: its client, its protocol, its loop.

It speaks a given text, or counts, or answers what the test wants, and does what the test says: hangs, dies, fails,
holds. Of runs it has the events (`tests/support/scripted_runs.py`).
"""

from __future__ import annotations

import asyncio
import threading
from array import array
from collections import deque
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
    ForgetPrefixes,
    Generate,
    Outputs,
    PinAdapter,
    Pool,
    Ready,
    SequenceFailed,
    SequenceOutput,
    StartTraining,
    StopTraining,
    TokenLogprob,
    Training,
)
from tenora.training.events import StoppedEvent
from tenora.training.spec import TrainSpec
from tests.support.patience import PATIENCE
from tests.support.scripted_runs import RunScript, ScriptedRun, is_last, step_event

CRASH = 666  # while it counts, a prompt that begins with it kills the engine
FAIL = 404  # … is answered by a failure whose code is the group
SILENT = 111  # … is never answered

READY = Ready(
    device="cpu",
    dtype="float32",
    max_model_len=512,
    hidden_size=4,
    kv_blocks=32,
    block_size=16,
    target_modules=("q_proj", "v_proj"),
    adapter_pool_bytes=512 * 2**20,
    adapter_slots=256,
)


Answer = Sequence[SequenceOutput | SequenceFailed]
"""What a sequence comes to, an item with each step of the engine."""


@dataclass
class Script(RunScript):
    """What the engine says, and what it was told. Shared with the test's thread.

    Attributes:
        ready: what it says when it is loaded.
        states: what every `Pool` is answered.
        answer: what a request is answered; None: as `tokens` has it. An answer without an end leaves the sequence open,
            and an error that it raises is the engine's death.
        tokens: every sequence generates these, over and over; None counts upwards from the prompt's last token, and a
            prompt may then begin with one of the words above.
        hold_after: a sequence stops giving tokens after this many, and goes on only when this changes.
        fail_after: a sequence fails with `fail_code` after this many tokens.
        hang: while set, the loop hangs inside a step, until `released`.
        alternatives: the likeliest tokens at each place, after the one that is generated.
        resident: the digests on the device.
    """

    ready: Ready = READY
    states: Callable[[Pool], Sequence[float]] = lambda request: [float(request.token_ids[-1]), 4.0, 0.0, 3.0]
    answer: Callable[[Generate], Answer | None] | None = None
    tokens: Sequence[int] | None = (5,)
    hold_after: int | None = None
    fail_after: int | None = None
    fail_code: str = "engine_error"
    alternatives: Sequence[int] = (7, 8, 9)
    resident: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._waiting: list[Callable[[], object]] = []
        self.requests: list[Generate] = []
        self.pools: list[Pool] = []
        self.aborted: list[str] = []
        self.pins: list[tuple[AdapterRef, bool]] = []
        self.evicted: list[str] = []
        self.forgotten: list[str] = []
        self.specs: list[TrainSpec] = []
        self.stopped: list[tuple[str, bool]] = []
        self.acknowledged: dict[str, int] = {}
        self.hang = threading.Event()
        self.released = threading.Event()
        self.held = 0  # runs that have come to where they wait, and that nobody has asked for yet
        self.dies = False
        self.away = False  # no engine is loaded, of those in an event loop
        self.wake: Callable[[], None] = lambda: None  # of the engine that there is

    @classmethod
    def counting(cls) -> Script:
        """Counts upwards, and makes steps of runs until they are stopped."""
        return cls(tokens=None, makes_steps=True)

    @property
    def generated(self) -> list[Generate]:
        """The requests for tokens."""
        return [request for request in self.requests if request.sampling.max_tokens != 0]

    @property
    def scored(self) -> list[Generate]:
        """The requests that ask for no token."""
        return [request for request in self.requests if request.sampling.max_tokens == 0]

    @property
    def pinned(self) -> dict[str, bool]:
        """By digest, what was said last of each."""
        return {ref.digest: pinned for ref, pinned in self.pins}

    def leave(self) -> None:
        """The engine dies, and none takes its place until one may come back."""
        self.away = self.dies = True
        self.wake()

    def come_back(self) -> None:
        """There may be an engine again."""
        self.away = False
        self.wake()

    def go_on(self) -> None:
        """Runs that wait go on, and none waits any more."""
        self.hold_at, self.hold_end = None, False
        self.wake()

    async def until_held(self) -> None:
        """Wait until one more run waits."""
        await self.until(lambda: self.held > 0)
        self.held -= 1

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to be true of what the engine was told, whatever thread it is in."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(changed.set)

        self._waiting.append(wake)
        try:
            async with asyncio.timeout(PATIENCE):
                while not condition():
                    await changed.wait()
                    changed.clear()
        finally:
            self._waiting.remove(wake)

    def has_changed(self) -> None:
        """Let those who wait look again."""
        for wake in list(self._waiting):
            wake()


class ScriptedEngine:
    """One token a step for every sequence, as the script has it.

    Attributes:
        running: of each sequence that generates, its request and how many tokens it has had.
        answers: of each sequence whose answer is given, what is to come of it.
        runs: of each run that is neither stopped nor scripted, how many steps it has made.
        scripted: the runs whose events are given.
        pending: what it says next.
    """

    def __init__(self, script: Script, wake: Callable[[], None]) -> None:
        self.ready = script.ready
        self.script = script
        self.script.wake = self.wake = wake
        self.running: dict[str, tuple[Generate, int]] = {}
        self.answers: dict[str, deque[SequenceOutput | SequenceFailed]] = {}
        self.runs: dict[str, int] = {}
        self.scripted: dict[str, ScriptedRun] = {}
        self.pending: list[Event] = []
        self.generated = 0

    @property
    def has_work(self) -> bool:
        return (
            self.script.dies
            or bool(self.pending or (self.script.makes_steps and self.runs))
            or any(self.answers.values())
            or any(not self._held(done) for _, done in self.running.values())
            or any(run.may_go_on or not run.held for run in self.scripted.values())
        )

    def add(self, command: Command) -> None:
        self._take(command)
        self.script.has_changed()

    def _take(self, command: Command) -> None:  # noqa: C901 - a case for each command
        script = self.script
        match command:
            case Generate():
                script.requests.append(command)
                self._begin(command)
            case Pool():
                script.pools.append(command)
                given = [] if script.hold_after == 0 else [pooled(command, script.states(command))]
                self.answers[command.request_id] = deque(given)
            case Abort(request_id=request_id):
                script.aborted.append(request_id)
                self.running.pop(request_id, None)
                self.answers.pop(request_id, None)
            case StartTraining(spec=spec):
                script.specs.append(spec)
                if script.training is not None:
                    self.scripted[spec.run_id] = ScriptedRun(spec, script, script.training(spec))
                else:
                    self.runs[spec.run_id] = 0
            case Acknowledge(run_id=run_id, count=count):
                script.acknowledged[run_id] = count
            case StopTraining(run_id=run_id, pause=pause):
                script.stopped.append((run_id, pause))
                if run_id in self.scripted:
                    self.scripted[run_id].stop(pause)
                elif run_id in self.runs:
                    step = self.runs.pop(run_id)
                    self.pending.append(Training(StoppedEvent(run_id=run_id, step=step, paused=pause)))
            case PinAdapter(adapter=ref, pinned=pinned):
                script.pins.append((ref, pinned))
            case EvictAdapter(digest=digest):
                script.evicted.append(digest)
            case ForgetPrefixes(cache_salt=cache_salt):
                script.forgotten.append(cache_salt)

    def _begin(self, request: Generate) -> None:
        if self.script.answer is not None and (answer := self.script.answer(request)) is not None:
            self.answers[request.request_id] = deque(answer)
            return
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
        if self.script.dies:
            self.script.dies = False
            raise RuntimeError("crash")
        events, self.pending = self.pending, []
        items: list[SequenceOutput | SequenceFailed] = []
        for request_id, (request, done) in list(self.running.items()):
            if self.script.fail_after is not None and done >= self.script.fail_after:
                items.append(SequenceFailed(request_id=request_id, code=self.script.fail_code, message="It failed."))
                del self.running[request_id]
            elif not self._held(done):
                items.append(self._next(request, done))
        items += self._answered()
        if items:
            events.append(Outputs(items))
        events += self._train()
        return events

    def _answered(self) -> list[SequenceOutput | SequenceFailed]:
        """The next of each answer that is given."""
        items = [answer.popleft() for answer in self.answers.values() if answer]
        for item in items:
            if isinstance(item, SequenceFailed) or item.finish_reason is not None:
                del self.answers[item.request_id]
        return items

    def _train(self) -> list[Event]:
        events: list[Event] = []
        for run_id, run in list(self.scripted.items()):
            if run.may_go_on:
                run.held = False
                events.append(Training(event := run.next()))
                if is_last(event):
                    del self.scripted[run_id]
            elif not run.held:
                run.held = True
                self.script.held += 1
                self.script.has_changed()
        if self.script.makes_steps:
            for run_id in self.runs:
                self.runs[run_id] += 1
                events.append(Training(step_event(run_id, self.runs[run_id])))
        return events

    def stats(self) -> EngineStats:
        return EngineStats(
            running=len(self.running) + len(self.answers),
            kv_blocks_total=32,
            kv_blocks_used=8,
            generation_tokens=self.generated,
            adapter_slots=4,
            adapters_resident=self.script.resident,
            adapters_running=("ab" * 32,),
            training_runs=len(self.runs) + len(self.scripted),
        )

    def shutdown(self) -> list[Event]:
        names, runs = [*self.running, *self.answers], {**self.runs, **dict.fromkeys(self.scripted, 0)}
        failed = [SequenceFailed(request_id=name, code="engine_shutdown", message="bye") for name in names]
        stopped = [Training(StoppedEvent(run_id=run, step=step, paused=True)) for run, step in runs.items()]
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


def pooled(request: Pool, values: Sequence[float]) -> SequenceOutput:
    """The answer to a `Pool`."""
    return SequenceOutput(
        request_id=request.request_id,
        token_ids=[],
        finish_reason="stop",
        queue_seconds=0.0,
        pooled=array("f", values).tobytes(),
    )
