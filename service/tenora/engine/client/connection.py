"""A connection to an engine that another process keeps: it comes and goes with that engine. Free of torch."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from tenora.backoff import Backoff
from tenora.engine.client.link import decode_event, encode
from tenora.engine.messages import Command, Event, Loading, Ready, Shutdown
from tenora.unix_socket import connect, pack, read_message

_log = logging.getLogger(__name__)

PAUSE_SECONDS = (0.05, 1.0)  # first and longest pause before the next try to connect; it doubles in between


class EngineConnection:
    """One connection after another, until `close`. What `tenora.engine.client.supervisor.EngineSupervisor` is to the
    process that owns the engine, this is to every other: the owner starts the engine, watches it and replaces it.

    Attributes:
        ready: what the engine said when it was loaded; the last one's while a new one starts.
        up: set while there is a loaded engine at the other end.
        closing: set once `close` was called.
        last_heard: `time.monotonic()` of the last event; 0 before the first.
        loading: None; only the owner hears how far an engine is.
        restarts: how often a lost connection was made again.
        trouble: None; that an engine does not come back is the owner's to tell.
    """

    def __init__(self, door: Path, *, on_event: Callable[[Event], None], on_lost: Callable[[], None]) -> None:
        """`on_event` gets every event; `on_lost` is called when a connection has ended, after its last event."""
        self.ready: Ready | None = None
        self.up = asyncio.Event()
        self.closing = asyncio.Event()
        self.last_heard = 0.0
        self.loading: Loading | None = None
        self.restarts = 0
        self.trouble: str | None = None
        self._door = door
        self._on_event = on_event
        self._on_lost = on_lost
        self._writer: asyncio.StreamWriter | None = None
        self._task: asyncio.Task[None] | None = None

    async def start(self, seconds: float) -> None:  # noqa: ARG002 - as the supervisor's
        """Begin to connect, and wait until an engine is there, however long that takes: `seconds` is the owner's."""
        self._task = asyncio.create_task(self._keep(), name="engine-connection")
        await self.up.wait()

    async def close(self) -> None:
        """Leave: the engine ends what this process began."""
        self.closing.set()
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    def send(self, command: Command) -> None:
        """Send to the engine if there is one; what it had to do with is over otherwise."""
        if self.up.is_set() and self._writer is not None and not isinstance(command, Shutdown):
            self._writer.write(pack(encode(command)))

    async def _keep(self) -> None:
        backoff, told = Backoff(*PAUSE_SECONDS, stable=0.0), False
        while True:
            lived = 0.0
            try:
                reader, self._writer = await asyncio.open_unix_connection(sock=connect(self._door))
            except OSError as error:
                if not told:  # once, however often it is tried
                    _log.info(
                        "no engine lets this process in: its owner starts one, or is gone", extra={"reason": str(error)}
                    )
                told = True
            else:
                began = time.monotonic()
                await self._hear(reader, self._writer)
                lived, told = time.monotonic() - began, False
                self.restarts += 1
                _log.warning("the connection to the engine was lost; connecting again")
            await asyncio.sleep(backoff.after(lived))

    async def _hear(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection, to its end."""
        try:
            while (frame := await read_message(reader)) is not None:
                self._receive(decode_event(frame))
        except (msgspec.DecodeError, ValueError) as error:
            _log.error("the engine sent what cannot be read", extra={"reason": str(error)})
        finally:
            self.up.clear()
            writer.close()
            self._writer = None
            self._on_lost()

    def _receive(self, event: Event) -> None:
        self.last_heard = time.monotonic()
        if isinstance(event, Ready):
            self.ready = event
            self.up.set()
        self._on_event(event)
