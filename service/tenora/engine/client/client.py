"""AsyncEngine: how the control plane talks to the engine. Free of torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from tenora.aclosing import aclosing
from tenora.adapters.ref import AdapterRef
from tenora.config import Settings
from tenora.engine.client.child import ProcessLink
from tenora.engine.client.connection import EngineConnection
from tenora.engine.client.link import Link, ThreadLink, check
from tenora.engine.client.streams import RunStream, SequenceStream
from tenora.engine.client.supervisor import EngineSupervisor
from tenora.engine.messages import (
    Abort,
    Acknowledge,
    EngineStats,
    Event,
    EvictAdapter,
    ForgetPrefixes,
    Generate,
    Heartbeat,
    Loading,
    Outputs,
    PinAdapter,
    Pool,
    PutCommand,
    Ready,
    SequenceFailed,
    SequenceOutput,
    StartSession,
    StartTraining,
    StopTraining,
    Training,
)
from tenora.engine.protocols import StepEngine
from tenora.errors import ConflictError, NotFoundError, RateLimitedError, UnavailableError
from tenora.training.commands import RunCommand
from tenora.training.events import TrainEvent
from tenora.training.spec import SessionSpec, TrainSpec

_log = logging.getLogger(__name__)

OUTPUT_BUFFER = 1024  # outputs that a consumer may lag behind


class AsyncEngine:
    """The engine as a process sees it that uses it. Every method runs on the event loop that called `start`.

    The engine lives elsewhere and may die or hang: then every open request ends with UnavailableError, and a new engine
    is started with exponential back-off by the process that owns it. Pinned adapters are pinned again.
    """

    def __init__(
        self,
        settings: Settings,
        model_dir: Path,
        *,
        door: Path | None = None,
        link: Callable[[], Link] | None = None,
        connection: Path | None = None,
    ) -> None:
        """Nothing is started before `start`.

        Args:
            settings: what the engine is started with, and the limits of this client.
            model_dir: the base.
            door: where the engine lets other processes in; None: nowhere.
            link: makes the line to an engine; None: to a child process.
            connection: the door of an engine that another process owns; then none is started here.
        """
        self._settings = settings
        self._owns = connection is None
        self._supervisor: EngineSupervisor | EngineConnection
        if connection is None:
            self._supervisor = EngineSupervisor(
                link or (lambda: ProcessLink(settings, model_dir, door)),
                on_event=self._on_event,
                on_lost=self._on_lost,
                hang_seconds=settings.engine_hang_seconds,
            )
        else:
            self._supervisor = EngineConnection(connection, on_event=self._on_event, on_lost=self._on_lost)
        self._stats = EngineStats()
        self._others = 0
        self._sequences: dict[str, SequenceStream] = {}
        self._runs: dict[str, RunStream] = {}
        self._pinned: dict[str, AdapterRef] = {}
        self._no_sequences = asyncio.Event()
        self._no_sequences.set()

    @classmethod
    def in_thread(cls, settings: Settings, build: Callable[[Callable[[], None]], StepEngine]) -> AsyncEngine:
        """The same client with the engine in a thread: for tests. `build(wake)` is called anew at each (re)start."""
        return cls(settings, Path(), link=lambda: ThreadLink(build))

    @classmethod
    def attached(cls, settings: Settings, door: Path) -> AsyncEngine:
        """A client of the engine that another process owns and that listens at `door`."""
        return cls(settings, Path(), connection=door)

    # ---- state ----------------------------------------------------------------------------------------------------

    @property
    def ready(self) -> Ready:
        """What the engine said when it was loaded. Raises UnavailableError before the first start."""
        if self._supervisor.ready is None:
            raise UnavailableError("The engine has not started; wait for start() to return.")
        return self._supervisor.ready

    @property
    def stats(self) -> EngineStats:
        """As of the last heartbeat; zero after a restart."""
        return self._stats

    @property
    def loading(self) -> Loading | None:
        """How far an engine is that is being loaded; None before its first word and once it is there."""
        return self._supervisor.loading

    @property
    def alive(self) -> bool:
        """Whether an engine is loaded and running (it may hang)."""
        return self._supervisor.up.is_set()

    @property
    def last_heartbeat(self) -> float:
        """`time.monotonic()` of the last sign of life of the step loop; 0 before the first."""
        return self._supervisor.last_heard

    @property
    def healthy(self) -> bool:
        """Whether it is alive and showed a sign of life within `engine_hang_seconds`."""
        return self.alive and time.monotonic() - self.last_heartbeat < self._settings.engine_hang_seconds

    @property
    def trouble(self) -> str | None:
        """What a restart of this process would help against, and nothing else; None while there is no such thing."""
        return self._supervisor.trouble

    @property
    def restarts(self) -> int:
        """How often an engine that died or hung was replaced."""
        return self._supervisor.restarts

    @property
    def open_requests(self) -> int:
        """Requests that have not ended, waiting ones included; those of other clients as of the last heartbeat."""
        return len(self._sequences) + self._others

    @property
    def queued(self) -> int:
        """Requests that have not had their first token."""
        return sum(1 for stream in self._sequences.values() if not stream.started)

    # ---- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the engine and wait until the base is loaded; `loading` says meanwhile how far it is.

        Raises:
            UnsupportedModelError, ConfigurationError: it cannot serve this model with these settings.
            UnavailableError: it died, or made no progress for `engine_start_seconds`.
        """
        await self._supervisor.start(self._settings.engine_start_seconds)

    async def wait_alive(self) -> None:
        """Wait until an engine is loaded and running, after a restart for example."""
        await self._supervisor.up.wait()

    async def close(self, grace: float) -> None:
        """Stop for good: open requests may finish for `grace` seconds, training runs are paused and saved."""
        self._supervisor.closing.set()
        if self.alive:
            await self._wait_for_sequences(grace)
        await self._supervisor.close()

    # ---- use ------------------------------------------------------------------------------------------------------

    async def generate(self, request: Generate | Pool, *, batch: int = 1) -> AsyncGenerator[SequenceOutput, None]:
        """Run a sequence. Ends after the output with a finish_reason. Closing the iterator aborts the sequence.

        Args:
            request: what to generate, or of what to pool the hidden states.
            batch: steps whose tokens come as one output, if nobody waits for each of them; the first comes at once.

        Raises:
            RateLimitedError: `max_queued_requests` requests wait already.
            UnavailableError: no engine, it died, the adapter could not be loaded, or the step failed (see `code`).
            InvalidRequestError: the engine cannot run such a request.
        """
        self._require_engine()
        check(request)
        if self.queued >= self._settings.max_queued_requests:
            raise RateLimitedError("Too many requests are waiting; retry in a moment.", code="queue_full")
        if request.request_id in self._sequences:
            raise ConflictError(f"A request {request.request_id!r} is running; use a fresh id.")
        stream = self._sequences[request.request_id] = SequenceStream(OUTPUT_BUFFER, batch)
        self._no_sequences.clear()
        self._supervisor.send(request)
        try:
            while True:
                output = await stream.get()
                yield output
                if output.finish_reason is not None:
                    return
        finally:
            if not stream.ended:
                self._supervisor.send(Abort(request.request_id))
            self._drop(request.request_id)

    async def pool(self, request: Pool) -> SequenceOutput:
        """Run a sequence that ends with its prompt; the answer has `pooled`. Cancelling aborts the sequence.

        Raises:
            RateLimitedError, UnavailableError, InvalidRequestError: as `generate`.
        """
        async with aclosing(self.generate(request)) as outputs:
            return await anext(outputs)

    async def train(self, spec: TrainSpec | SessionSpec) -> AsyncGenerator[TrainEvent, None]:
        """Start or resume a run and follow it. Ends after its terminal event. Closing the iterator pauses the run.

        A session's answers to what it is `put` are among the events; it ends when it is stopped.

        Raises:
            UnavailableError: no engine, or it died; the run can be resumed from its last checkpoint.
            ConflictError: the run is being followed already.
        """
        self._require_engine()
        while (previous := self._runs.get(spec.run_id)) is not None:
            if not previous.abandoned:
                raise ConflictError(f"The run {spec.run_id!r} is in progress already.")
            await previous.over.wait()  # its consumer left and it is about to pause
        self._require_engine()
        stream = self._runs[spec.run_id] = RunStream()
        self._supervisor.send(StartSession(spec) if isinstance(spec, SessionSpec) else StartTraining(spec))
        try:
            while True:
                event = await stream.get()
                yield event
                if stream.is_terminal(event):
                    return
        finally:
            stream.abandoned = True
            if not stream.over.is_set():
                self._supervisor.send(StopTraining(spec.run_id, pause=True))

    async def put(self, run_id: str, command: RunCommand) -> None:
        """Tell a run that is being followed here to do something; the answer is an event of `train`.

        Raises:
            UnavailableError: no engine.
            NotFoundError: no such run is followed.
            InvalidRequestError: a value is of the wrong type or size.
        """
        self._require_engine()
        if run_id not in self._runs:
            raise NotFoundError(f"The run {run_id!r} is not in progress.")
        message = PutCommand(run_id, command)
        check(message)
        self._supervisor.send(message)

    async def acknowledge(self, run_id: str, events: int) -> None:
        """The oldest `events` of the followed run's `Recorded` ones, without those of earlier calls, are recorded.

        The run need not tell them again when it is resumed. A run that is over is not told: it is resumed with what it
        knew when it ended.
        """
        if (stream := self._runs.get(run_id)) is not None and not stream.abandoned:
            stream.acknowledged += events
            self._supervisor.send(Acknowledge(run_id, stream.acknowledged))

    async def stop_training(self, run_id: str, *, pause: bool = False) -> None:
        """Cancel a run, or pause it; `train` then ends with a StoppedEvent. Unknown runs are ignored."""
        self._supervisor.send(StopTraining(run_id, pause=pause))

    async def pin(self, ref: AdapterRef, pinned: bool = True) -> None:
        """Load an adapter and keep its slot, also over restarts; or no longer keep it."""
        self._note_pin(ref, pinned)
        self._supervisor.send(PinAdapter(ref, pinned))

    async def evict(self, digest: str) -> None:
        """The version was deleted: free what the engine holds of it as soon as no sequence uses it."""
        self._pinned.pop(digest, None)
        self._supervisor.send(EvictAdapter(digest))

    async def forget_prefixes(self, cache_salt: str) -> None:
        """Whoever this namespace was for is gone: no prefix of it is found or remembered again."""
        self._supervisor.send(ForgetPrefixes(cache_salt))

    # ---- inside ---------------------------------------------------------------------------------------------------

    def _require_engine(self) -> None:
        if self._supervisor.closing.is_set():
            raise UnavailableError("The server is shutting down; retry on another one.", code="draining")
        if not self.alive:
            raise UnavailableError("The engine is starting; retry in a moment.")

    async def _wait_for_sequences(self, grace: float) -> None:
        try:
            async with asyncio.timeout(grace):
                await self._no_sequences.wait()
        except TimeoutError:
            _log.warning("requests outlast the grace and end with an error", extra={"requests": len(self._sequences)})

    def _on_lost(self) -> None:
        """The engine is gone: nobody may wait for it."""
        self._stats, self._others = EngineStats(), 0
        streams: list[SequenceStream | RunStream] = [*self._sequences.values(), *self._runs.values()]
        for stream in streams:
            stream.fail(
                UnavailableError("The engine stopped while it worked on this; retry in a moment.", code="engine_lost")
            )
        self._runs.clear()

    def _on_event(self, event: Event) -> None:
        match event:
            case Outputs(items=items):
                for item in items:
                    self._on_output(item)
            case Training(event=training):
                if (run := self._runs.get(training.run_id)) is not None:
                    run.put(training)
                    if run.over.is_set():
                        del self._runs[training.run_id]
            case Heartbeat(stats=stats, others=others):
                self._stats, self._others = stats, others
            case Ready() if self._owns:
                for ref in self._pinned.values():
                    self._supervisor.send(PinAdapter(ref))
            case PinAdapter(adapter=ref, pinned=pinned):  # another client asked for it
                self._note_pin(ref, pinned)
            case EvictAdapter(digest=digest):
                self._pinned.pop(digest, None)

    def _note_pin(self, ref: AdapterRef, pinned: bool) -> None:
        if pinned:
            self._pinned[ref.digest] = ref
        else:
            self._pinned.pop(ref.digest, None)

    def _on_output(self, item: SequenceOutput | SequenceFailed) -> None:
        stream = self._sequences.get(item.request_id)
        if stream is None:
            return
        if isinstance(item, SequenceFailed):
            stream.fail_as(item)
        elif not stream.put(item):
            self._supervisor.send(Abort(item.request_id))

    def _drop(self, request_id: str) -> None:
        self._sequences.pop(request_id, None)
        if not self._sequences:
            self._no_sequences.set()
