"""The engine's loop: take commands, step, emit, tell that it lives. The same in a child process and in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from tenora.engine.clients import OWNER, Addressed, Clients
from tenora.engine.messages import Shutdown
from tenora.engine.protocols import Channel, Joined, Left, StepEngine

HEARTBEAT_SECONDS = 0.5


def run_loop(engine: StepEngine, channel: Channel, orphaned: Callable[[], bool] = lambda: False) -> None:
    """Serve until the owner says Shutdown or `orphaned` says that it is gone.

    Heartbeats come from here and from nowhere else: when a step hangs, they stop.
    """
    clients = Clients(engine)

    def tell(messages: Iterable[Addressed]) -> None:
        for client, event in messages:
            channel.send(client, event)

    channel.send(OWNER, engine.ready)
    beat = 0.0
    while not orphaned():
        for client, message in channel.receive(0.0 if engine.has_work else HEARTBEAT_SECONDS):
            match message:
                case Shutdown() if client == OWNER:
                    for event in engine.shutdown():
                        tell(clients.addressed(event))
                    return
                case Shutdown():
                    continue  # only the owner ends the engine
                case Joined():
                    tell(clients.joined(client))
                case Left():
                    clients.left(client)
                case command:
                    tell(clients.take(client, command))
        for event in engine.step():
            tell(clients.addressed(event))
        if (now := time.monotonic()) - beat >= HEARTBEAT_SECONDS:
            tell(clients.heartbeats())
            beat = now
