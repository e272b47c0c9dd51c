"""The engine's loop: take commands, step, emit, tell that it lives. The same in a child process and in a thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from tenora.engine.messages import Command, EngineStats, Event, Heartbeat, Ready, Shutdown

HEARTBEAT_SECONDS = 0.5


class StepEngine(Protocol):
    """What the loop drives; `tenora.engine.core.Engine` is one."""

    @property
    def ready(self) -> Ready:
        """What is announced before anything else."""
        ...

    @property
    def has_work(self) -> bool:
        """Whether `step` can get anything done now; if not, the loop sleeps until a command or a wake-up."""
        ...

    def add(self, command: Command) -> None:
        """Take a command other than Shutdown. Never raises; what is wrong with it comes out of `step` as an event."""
        ...

    def step(self) -> list[Event]:
        """Do one piece of work."""
        ...

    def stats(self) -> EngineStats:
        """Counters and gauges of now."""
        ...

    def shutdown(self) -> list[Event]:
        """End everything: sequences fail, training saves its state."""
        ...


class Channel(Protocol):
    """The engine's end of the line to the API."""

    def receive(self, timeout: float) -> list[Command]:
        """Commands that arrived; blocks up to `timeout` seconds for the first command or a wake-up."""
        ...

    def send(self, event: Event) -> None:
        """Send an event; never blocks."""
        ...


def run_loop(engine: StepEngine, channel: Channel, orphaned: Callable[[], bool] = lambda: False) -> None:
    """Serve until Shutdown arrives or `orphaned` says that nobody is left to serve.

    Heartbeats come from here and from nowhere else: when a step hangs, they stop.
    """
    channel.send(engine.ready)
    beat = 0.0
    while not orphaned():
        for command in channel.receive(0.0 if engine.has_work else HEARTBEAT_SECONDS):
            if isinstance(command, Shutdown):
                for event in engine.shutdown():
                    channel.send(event)
                return
            engine.add(command)
        for event in engine.step():
            channel.send(event)
        if (now := time.monotonic()) - beat >= HEARTBEAT_SECONDS:
            channel.send(Heartbeat(stats=engine.stats()))
            beat = now
