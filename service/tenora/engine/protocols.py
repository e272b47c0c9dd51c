"""What the engine's loop stands between: the engine that it drives, and the line to those who use it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from tenora.engine.messages import Command, EngineStats, Event, Ready


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


@dataclass(frozen=True, slots=True)
class Joined:
    """A client has come."""


@dataclass(frozen=True, slots=True)
class Left:
    """A client is gone; nothing more comes of it."""


Arrival = tuple[str, Command | Joined | Left]
"""A client's name and what came of it. The owner (`tenora.engine.clients.OWNER`) is there from the first moment."""


class Channel(Protocol):
    """The engine's end of the line to its clients."""

    def receive(self, timeout: float) -> list[Arrival]:
        """What arrived; blocks up to `timeout` seconds for the first arrival or a wake-up."""
        ...

    def send(self, client: str, event: Event) -> None:
        """Send an event; never blocks, and is lost if the client is gone."""
        ...
