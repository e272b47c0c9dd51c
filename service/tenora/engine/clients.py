"""The processes that an engine works for, told apart: each has ids of its own, and hears of its own alone.

One of them owns the engine: it started it and ends it. The others come and go. What one of them had begun ends when it
goes: its sequences are aborted, and its runs are stopped so that whoever starts one again misses nothing. A run that
keeps what nobody has acknowledged is paused: it goes on from there, and says that again. Any other is given up: it goes
on from its last saved state, and what it has said since then it says again.
"""

from __future__ import annotations

from collections import Counter
from typing import Final

import msgspec

from tenora.engine.messages import (
    Abort,
    Acknowledge,
    Command,
    Event,
    EvictAdapter,
    Generate,
    Heartbeat,
    Outputs,
    PinAdapter,
    Pool,
    PutCommand,
    SequenceFailed,
    SequenceOutput,
    StartSession,
    StartTraining,
    StopTraining,
    Training,
)
from tenora.engine.protocols import StepEngine
from tenora.training.commands import Refused
from tenora.training.events import FailedEvent, FinishedEvent, StoppedEvent

OWNER: Final = "owner"
"""The name of the client that started the engine."""

Addressed = tuple[str, Event]
"""A client and what it is to hear."""

_Asked = tuple[str, StartTraining | StartSession]
"""A client and the run that it has asked for."""


class Clients:
    """Between the loop and its engine: commands in from each client, events out to the one that they concern."""

    def __init__(self, engine: StepEngine) -> None:
        self._engine = engine
        self._present = [OWNER]
        # Of all but the owner, whose ids are the engine's: id in the engine → the client and its own id.
        self._sequences: dict[str, tuple[str, str]] = {}
        self._runs: dict[str, _Asked] = {}
        self._waiting: dict[str, _Asked] = {}  # until another client's run of the same id has ended

    def joined(self, client: str) -> list[Addressed]:
        """A client has come."""
        self._present.append(client)
        return [(client, self._engine.ready)]

    def left(self, client: str) -> None:
        """A client is gone, and nobody waits for what it began."""
        self._present.remove(client)
        for inner in [inner for inner, (of, _) in self._sequences.items() if of == client]:
            del self._sequences[inner]
            self._engine.add(Abort(inner))
        self._waiting = {run: asked for run, asked in self._waiting.items() if asked[0] != client}
        for run, (of, command) in self._runs.items():
            if of == client:
                self._engine.add(StopTraining(run, pause=_keeps_what_it_said(command)))

    def take(self, client: str, command: Command) -> list[Addressed]:
        """Give a command other than Shutdown to the engine, or keep it; what is to be said at once."""
        told: list[Addressed] = []
        match command:
            case Generate(request_id=own) | Pool(request_id=own) if client != OWNER:
                inner = _inner(client, own)
                self._sequences[inner] = (client, own)
                command = msgspec.structs.replace(command, request_id=inner)
            case Abort(request_id=own) if client != OWNER:
                inner = _inner(client, own)
                self._sequences.pop(inner, None)
                command = Abort(inner)
            case StartTraining(spec=spec) | StartSession(spec=spec):
                if self._runs.setdefault(spec.run_id, (client, command))[0] != client:
                    self._waiting[spec.run_id] = (client, command)
                    return told
            case PutCommand(run_id=run_id, command=put) if self._follower(run_id) != client:
                unknown = "No run of this name has been started here."
                refused = Refused(run_id=run_id, command_id=put.command_id, code="unknown_run", message=unknown)
                return [(client, Training(refused))]
            case Acknowledge(run_id=run_id) if self._follower(run_id) != client:
                return told  # another client follows it by now
            case StopTraining(run_id=run_id):
                if run_id in self._waiting and self._waiting[run_id][0] == client:
                    del self._waiting[run_id]
                    return [(client, Training(StoppedEvent(run_id=run_id, step=0, paused=command.pause)))]
                if self._follower(run_id) != client:
                    return told
            case PinAdapter() | EvictAdapter():
                # The owner says it again to the engine's successor.
                told = [] if client == OWNER else [(OWNER, command)]
        self._engine.add(command)
        return told

    def addressed(self, event: Event) -> list[Addressed]:
        """Who hears of an event of the engine."""
        match event:
            case Outputs(items=items) if self._sequences:
                return self._outputs(items)
            case Training(event=training):
                client = self._follower(training.run_id)
                if isinstance(training, FinishedEvent | StoppedEvent | FailedEvent):
                    self._ended(training.run_id)
                return [(client, event)] if client in self._present else []
        return [(OWNER, event)]

    def heartbeats(self) -> list[Addressed]:
        """A sign of life for everybody."""
        stats = self._engine.stats()
        every = stats.running + stats.waiting
        own = Counter(client for client, _ in self._sequences.values())
        own[OWNER] = every - own.total()
        return [(client, Heartbeat(stats=stats, others=max(0, every - own[client]))) for client in self._present]

    def _outputs(self, items: list[SequenceOutput | SequenceFailed]) -> list[Addressed]:
        shares: dict[str, list[SequenceOutput | SequenceFailed]] = {}
        for item in items:
            client, own = self._sequences.get(item.request_id, (OWNER, item.request_id))
            if client != OWNER:
                if isinstance(item, SequenceFailed) or item.finish_reason is not None:
                    del self._sequences[item.request_id]
                item = msgspec.structs.replace(item, request_id=own)  # noqa: PLW2901 - the same under its own id
            shares.setdefault(client, []).append(item)
        return [(client, Outputs(share)) for client, share in shares.items()]

    def _follower(self, run_id: str) -> str | None:
        asked = self._runs.get(run_id)
        return None if asked is None else asked[0]

    def _ended(self, run_id: str) -> None:
        self._runs.pop(run_id, None)
        if (asked := self._waiting.pop(run_id, None)) is not None:
            self._runs[run_id] = asked
            self._engine.add(asked[1])


def _keeps_what_it_said(command: StartTraining | StartSession) -> bool:
    return isinstance(command, StartTraining) and command.spec.acknowledged


def _inner(client: str, request_id: str) -> str:
    """The engine's id of a sequence; no id that an owner makes holds a slash after a client's name."""
    return f"{client}/{request_id}"
