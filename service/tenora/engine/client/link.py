"""The API's end of the line to an engine: one incarnation of it, in a child process or in a thread."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import Protocol

import msgspec

from tenora.engine.clients import OWNER
from tenora.engine.loop import run_loop
from tenora.engine.messages import Command, Event, StartFailed
from tenora.engine.protocols import Arrival, StepEngine
from tenora.errors import DeviceLostError, InvalidRequestError, TenoraError

_encoder = msgspec.msgpack.Encoder()
_commands: msgspec.msgpack.Decoder[Command] = msgspec.msgpack.Decoder(Command)
_events: msgspec.msgpack.Decoder[Event] = msgspec.msgpack.Decoder(Event)


def encode(message: Command | Event) -> bytes:
    """A message as msgpack."""
    return _encoder.encode(message)


def decode_command(frame: bytes) -> Command:
    """The command in a frame. Raises msgspec.ValidationError if it is none."""
    return _commands.decode(frame)


def decode_event(frame: bytes) -> Event:
    """The event in a frame. Raises msgspec.ValidationError if it is none."""
    return _events.decode(frame)


def check(command: Command) -> None:
    """Raise InvalidRequestError for values that the other side could not decode: there, they would end everybody's."""
    try:
        decode_command(encode(command))
    except (msgspec.ValidationError, OverflowError, TypeError) as error:
        raise InvalidRequestError(f"The request holds a value of the wrong type or size: {error}") from error


def start_failed(error: Exception) -> StartFailed:
    """What an engine says when it cannot start."""
    if isinstance(error, TenoraError):
        return StartFailed(code=error.code or "engine_error", message=error.message)
    if isinstance(error, MemoryError):
        return StartFailed(
            code="out_of_memory", message="The engine ran out of memory while loading; use smaller pools."
        )
    return StartFailed(code="engine_error", message=f"The engine could not start: {type(error).__name__}: {error}")


class Link(Protocol):
    """One incarnation of an engine. Made, opened, and thrown away when `closed` returns."""

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Start the engine. `on_event` is called on the event loop for each event, until `closed` returns."""
        ...

    def send(self, command: Command) -> None:
        """Send a command; never blocks, and is lost if the engine is dead."""
        ...

    async def closed(self) -> str:
        """Wait until the engine is gone and its last event was delivered; say how it ended."""
        ...

    def kill(self) -> None:
        """End it now."""
        ...


class ThreadLink:
    """Runs an engine in a thread of this process: the seam for tests, with the messages encoded as on the socket."""

    def __init__(self, build: Callable[[Callable[[], None]], StepEngine]) -> None:
        """`build(wake)` makes the engine, in its thread; `wake` may be called from any thread to end an idle wait."""
        self._build = build
        self._inbox: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._on_event: Callable[[Event], None] = _ignore
        self._killed = threading.Event()

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Start the thread."""
        self._on_event = on_event
        threading.Thread(target=self._run, name="engine", daemon=True).start()

    def send(self, command: Command) -> None:
        """Put a command into the thread's inbox."""
        self._inbox.put(encode(command))

    async def closed(self) -> str:
        """Wait for the thread's end."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """Make the loop return at its next turn, without a word to anybody."""
        self._killed.set()
        self._inbox.put(None)

    def _run(self) -> None:
        reason = "the engine's thread returned"
        try:
            engine = self._build(lambda: self._inbox.put(None))
        except Exception as error:  # noqa: BLE001 — whatever it is, the other side is told
            self._deliver(encode(start_failed(error)))
        else:
            try:
                run_loop(engine, _ThreadChannel(self._inbox, self._deliver), self._killed.is_set)
            except (Exception, DeviceLostError) as error:  # noqa: BLE001 — stands for the death of the process
                reason = f"the engine's thread failed: {type(error).__name__}: {error}"
        self._call(lambda: self._ended.set_result(reason))

    def _deliver(self, frame: bytes) -> None:
        self._call(lambda: self._on_event(decode_event(frame)))

    def _call(self, callback: Callable[[], object]) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(callback)


def _ignore(_: Event) -> None:
    """What happens to events before `open`: there are none."""


class _ThreadChannel:
    """The thread's end of a ThreadLink."""

    def __init__(self, inbox: queue.SimpleQueue[bytes | None], deliver: Callable[[bytes], None]) -> None:
        self._inbox = inbox
        self._deliver = deliver

    def receive(self, timeout: float) -> list[Arrival]:
        frames: list[bytes | None] = []
        try:
            frames.append(self._inbox.get(timeout=timeout) if timeout else self._inbox.get_nowait())
            while True:
                frames.append(self._inbox.get_nowait())
        except queue.Empty:
            return [(OWNER, decode_command(frame)) for frame in frames if frame is not None]

    def send(self, client: str, event: Event) -> None:
        if client == OWNER:  # nobody else comes
            self._deliver(encode(event))
