"""Commands that a run was given and has not carried out yet."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from tenora.training.commands import Refused, RunCommand
from tenora.training.pass_queue import WorkQueue

MAX_WAITING = 64
"""Commands of one run; their rows lie in memory."""


class Inbox:
    """A run's commands in the order they came; a run that waits for one is no more in anybody's way than none.

    Attributes:
        run_id: whose.
    """

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id
        self._commands: deque[RunCommand] = deque()

    @property
    def done(self) -> bool:
        """Whether there is a command: see `tenora.training.pass_queue.Awaited`."""
        return bool(self._commands)

    def put(self, command: RunCommand) -> Refused | None:
        """Take a command, unless too many wait."""
        if len(self._commands) >= MAX_WAITING:
            message = f"{MAX_WAITING} commands of the run wait already; wait for an answer."
            return Refused(run_id=self.run_id, command_id=command.command_id, code="too_many_commands", message=message)
        self._commands.append(command)
        return None

    def take(self, queue: WorkQueue) -> Generator[None, None, RunCommand]:
        """Wait for a command."""
        queue.watch(self)
        while not self._commands:
            yield
        return self._commands.popleft()
