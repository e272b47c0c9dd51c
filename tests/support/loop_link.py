"""An engine in the event loop of the test, behind the real client: no thread whose turn a test would have to await.

It hears a command when it is sent, so that a test reads what the engine was told right behind the call that told it;
what it says comes later, as it does from a socket.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path

from tenora.config import Settings
from tenora.engine.client.client import AsyncEngine
from tenora.engine.client.link import decode_command, decode_event, encode
from tenora.engine.clients import OWNER
from tenora.engine.loop import HEARTBEAT_SECONDS, EngineLoop
from tenora.engine.messages import Command, Event
from tenora.engine.protocols import Arrival
from tests.support.scripted_engine import Script, ScriptedEngine


def in_loop(settings: Settings, script: Script) -> AsyncEngine:
    """The real client of engines that do what the script says."""
    return AsyncEngine(settings, Path(), link=lambda: LoopLink(script))


class LoopLink:
    """One incarnation of the scripted engine, with the messages encoded as on the socket."""

    def __init__(self, script: Script) -> None:
        self._script = script
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[str] = self._loop.create_future()
        self._over = False
        self._next: asyncio.Handle | None = None

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """Begin to load."""
        self._on_event = on_event
        self._loading = asyncio.create_task(self._load())

    def send(self, command: Command) -> None:
        """Give it to the engine at once."""
        self._turn([(OWNER, decode_command(encode(command)))])

    async def closed(self) -> str:
        """Wait for its end."""
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        """End it without a word to anybody."""
        self._end("the engine was killed")

    async def _load(self) -> None:
        told = asyncio.Event()
        self._script.wake = told.set
        while self._script.away:
            await told.wait()
            told.clear()
        self._engine = ScriptedEngine(self._script, lambda: self._wake_after(0.0))
        self._driver = EngineLoop(self._engine, self._deliver)
        self._turn()

    def _turn(self, arrivals: Sequence[Arrival] = ()) -> None:
        if self._over:
            return
        try:
            goes_on = self._driver.turn(arrivals)
        except Exception as error:  # noqa: BLE001 — stands for the death of the process
            self._end(f"the engine failed: {type(error).__name__}: {error}")
        else:
            if goes_on:
                self._wake_after(0.0 if self._engine.has_work else HEARTBEAT_SECONDS)
            else:
                self._end("the engine returned")

    def _wake_after(self, seconds: float) -> None:
        if self._next is not None:
            self._next.cancel()
        self._next = self._loop.call_later(seconds, self._turn) if seconds else self._loop.call_soon(self._turn)

    def _deliver(self, client: str, event: Event) -> None:
        if client == OWNER:  # nobody else comes
            frame = encode(event)
            self._loop.call_soon(lambda: self._on_event(decode_event(frame)))

    def _end(self, reason: str) -> None:
        if self._over:
            return
        self._over = True
        self._loading.cancel()
        if self._next is not None:
            self._next.cancel()
        self._loop.call_soon(self._ended.set_result, reason)  # behind its last event
