"""The engine's loop: how long it waits for what may come."""

from __future__ import annotations

from collections.abc import Iterator

from tenora.engine.clients import OWNER
from tenora.engine.loop import HEARTBEAT_SECONDS, run_loop
from tenora.engine.messages import Event, Shutdown
from tenora.engine.protocols import Arrival
from tests.engine.requests import generate, sampling
from tests.support.scripted_engine import Script, ScriptedEngine


class Arrivals:
    """A channel on which everything that comes is there at once.

    Attributes:
        waits: for how many seconds the loop would have waited, each time.
    """

    def __init__(self, *arrivals: list[Arrival]) -> None:
        self.waits: list[float] = []
        self._arrivals: Iterator[list[Arrival]] = iter(arrivals)

    def receive(self, timeout: float) -> list[Arrival]:
        self.waits.append(timeout)
        return next(self._arrivals)

    def send(self, client: str, event: Event) -> None:
        """Nobody hears it."""


def test_an_idle_loop_waits_until_the_next_heartbeat_and_one_with_work_does_not_wait() -> None:
    two_tokens: Arrival = (OWNER, generate([1], sampling(max_tokens=2)))
    channel = Arrivals([], [two_tokens], [], [], [(OWNER, Shutdown())])
    run_loop(ScriptedEngine(Script(), wake=lambda: None), channel)
    assert channel.waits == [HEARTBEAT_SECONDS, HEARTBEAT_SECONDS, 0.0, HEARTBEAT_SECONDS, HEARTBEAT_SECONDS]
