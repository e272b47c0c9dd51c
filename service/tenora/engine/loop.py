"""The engine's loop: take commands, step, emit, tell that it lives. The same in a child process and in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from tenora.engine.clients import OWNER, Addressed, Clients
from tenora.engine.messages import Event, Shutdown
from tenora.engine.protocols import Arrival, Channel, Joined, Left, StepEngine

HEARTBEAT_SECONDS = 0.5


class EngineLoop:
    """An engine and those it works for, a turn at a time.

    Heartbeats come from here and from nowhere else: when a step hangs, they stop.
    """

    def __init__(self, engine: StepEngine, send: Callable[[str, Event], None]) -> None:
        """Tell the owner that the engine is there; `send(client, event)` is how anybody is told anything."""
        self._engine = engine
        self._send = send
        self._clients = Clients(engine)
        self._beat = 0.0
        send(OWNER, engine.ready)

    def turn(self, arrivals: Iterable[Arrival]) -> bool:
        """Take what arrived and do one piece of work; False once the owner has said Shutdown."""
        clients = self._clients
        for client, message in arrivals:
            match message:
                case Shutdown() if client == OWNER:
                    for event in self._engine.shutdown():
                        self._tell(clients.addressed(event))
                    return False
                case Shutdown():
                    continue  # only the owner ends the engine
                case Joined():
                    self._tell(clients.joined(client))
                case Left():
                    clients.left(client)
                case command:
                    self._tell(clients.take(client, command))
        for event in self._engine.step():
            self._tell(clients.addressed(event))
        if (now := time.monotonic()) - self._beat >= HEARTBEAT_SECONDS:
            self._tell(clients.heartbeats())
            self._beat = now
        return True

    def _tell(self, messages: Iterable[Addressed]) -> None:
        for client, event in messages:
            self._send(client, event)


def run_loop(engine: StepEngine, channel: Channel, orphaned: Callable[[], bool] = lambda: False) -> None:
    """Serve until the owner says Shutdown or `orphaned` says that it is gone."""
    loop = EngineLoop(engine, channel.send)
    while not orphaned():
        if not loop.turn(channel.receive(0.0 if engine.has_work else HEARTBEAT_SECONDS)):
            return
