"""Runs that train in a process of their own, one at a time: what `AsyncEngine` offers for those in the engine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from tenora.config import Settings
from tenora.data.dataset import TokenizedDataset
from tenora.engine.client.child import available_cpus
from tenora.environment import for_child
from tenora.errors import ConflictError, UnavailableError
from tenora.model.spec import ModelSpec
from tenora.processes import bound_to_parent, describe_exit
from tenora.training.events import TrainEvent
from tenora.training.full.memory import admit, available_bytes
from tenora.training.full.selection import Selection
from tenora.training.full.wire import LENGTH_BYTES, TERMINAL, Acknowledge, FullEvent, Launch, Stop, decode_event, frame
from tenora.training.methods.table import find_method
from tenora.training.spec import TrainSpec

MODULE = "tenora.training.full"


class Trainer(Protocol):
    """Whoever trains: the engine, or a process for a run alone."""

    def train(self, spec: TrainSpec, /) -> AsyncGenerator[TrainEvent, None]:
        """Start or resume a run and follow it; UnavailableError if it died and can be resumed."""

    async def acknowledge(self, run_id: str, events: int, /) -> None:
        """The oldest `events` of the run's `Recorded` ones, without those of earlier calls, are recorded."""

    async def stop_training(self, run_id: str, /, *, pause: bool) -> None:
        """Cancel a run, or pause it. Unknown runs are ignored."""


@dataclass(slots=True)
class _Running:
    """The run that has a process now."""

    run_id: str
    process: asyncio.subprocess.Process
    acknowledged: int = 0

    def send(self, message: Stop | Acknowledge) -> None:
        """A dead process needs no command: its end is seen by whoever reads its events."""
        if self.process.stdin is not None and not self.process.stdin.is_closing():
            self.process.stdin.write(frame(message))


class ApartTrainer:
    """See `Trainer`. A process ends with this one, and with its run."""

    def __init__(self, settings: Settings, base: Path, available: Callable[[], int] = available_bytes) -> None:
        """`base`: directory of the base. `available`: bytes of memory that a new process can have now."""
        self._settings, self._base, self._available = settings, base, available
        self._turn = asyncio.Lock()
        self._running: _Running | None = None

    @property
    def pid(self) -> int | None:
        """Of the process that there is now."""
        return None if self._running is None else self._running.process.pid

    async def train(self, spec: TrainSpec, /) -> AsyncGenerator[TrainEvent, None]:
        """See `Trainer`. Closing the iterator kills the process; the run goes on from its last saved state.

        Raises:
            TrainingError: code insufficient_memory; nothing was started.
            UnavailableError: the process could not be started, or died.
            ConflictError: another run has the one process that there is at a time.
        """
        if self._turn.locked():
            raise ConflictError(f"The run {spec.run_id!r} has to wait: another one trains in a process of its own.")
        async with self._turn:
            await asyncio.to_thread(self._admit, spec)
            try:
                process = await asyncio.create_subprocess_exec(
                    *bound_to_parent(MODULE),
                    stdin=asyncio.subprocess.PIPE,
                    stdout=asyncio.subprocess.PIPE,
                    env=for_child(),
                )
            except OSError as error:
                raise UnavailableError(f"The training process could not be started: {error}.") from error
            running = self._running = _Running(spec.run_id, process)
            try:
                async for event in self._follow(running, spec):
                    yield event
            finally:
                self._running = None
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def acknowledge(self, run_id: str, events: int, /) -> None:
        """See `Trainer`."""
        if (running := self._running) is not None and running.run_id == run_id:
            running.acknowledged += events
            running.send(Acknowledge(count=running.acknowledged))

    async def stop_training(self, run_id: str, /, *, pause: bool) -> None:
        """See `Trainer`."""
        if (running := self._running) is not None and running.run_id == run_id:
            running.send(Stop(pause=pause))

    def _admit(self, spec: TrainSpec) -> None:
        """Before anything is begun."""
        model = ModelSpec.from_directory(self._base)
        settings = find_method(spec.method).own_settings(spec.method_settings)
        paths = [path for task in spec.tasks for path in (task.train_path, task.valid_path) if path]
        longest = max(int(np.diff(TokenizedDataset.load(Path(path)).offsets).max(initial=0)) for path in paths)
        admit(model, Selection.of(settings, model), longest, self._available())

    async def _follow(self, running: _Running, spec: TrainSpec) -> AsyncIterator[FullEvent]:
        process, settings = running.process, self._settings
        if process.stdin is None or process.stdout is None:
            raise UnavailableError("The training process has no pipes.")
        launch = Launch(
            spec=spec,
            base=str(self._base),
            device=settings.device,
            threads=settings.threads or available_cpus(),
            log_level=settings.log_level,
        )
        process.stdin.write(frame(launch))
        try:
            while True:
                length = int.from_bytes(await process.stdout.readexactly(LENGTH_BYTES), "big")
                event = decode_event.decode(await process.stdout.readexactly(length))
                yield event
                if isinstance(event, TERMINAL):
                    return
        except asyncio.IncompleteReadError:
            code = await process.wait()
            raise UnavailableError(f"The training process ended ({_described(code)}).") from None


def _described(code: int) -> str:
    """How it ended, and what that usually means."""
    reason = describe_exit(code)
    return f"{reason}; memory may have run out" if code == -signal.SIGKILL else reason
