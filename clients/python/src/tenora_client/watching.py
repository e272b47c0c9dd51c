"""Following a job until it is over: the decisions, without the waiting, for both clients."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Protocol

from tenora_client.errors import JobError, TenoraError, TransportError, UnavailableError
from tenora_client.models import JobEvent, JobState

PATIENCE = 60.0
"""Seconds for which `wait` lives through a server that does not answer: a restart resumes the job."""


class JobView(Protocol):
    """What can show a job while it runs."""

    def show(self, job: JobState, events: Sequence[JobEvent]) -> None:
        """Show a state and the events since the last call, oldest first."""

    def close(self) -> None:
        """The job is over, or nobody waits any longer."""


class Watch:
    """Which events are new, and whether to go on waiting."""

    def __init__(self, timeout: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._deadline = None if timeout is None else clock() + timeout
        self._silent_since: float | None = None
        self._last_event: str | None = None

    def is_seen(self, event: JobEvent) -> bool:
        """Whether this is the newest event of the last look: all older ones were shown too."""
        return event.id == self._last_event

    def saw(self, newest: JobEvent) -> None:
        """All events up to `newest` have been shown."""
        self._last_event = newest.id

    def heard(self) -> None:
        """The server answered."""
        self._silent_since = None

    def endure(self, error: TenoraError) -> None:
        """Raise `error`, unless it is a silence of the server that has not lasted long yet."""
        if not isinstance(error, (TransportError, UnavailableError)):
            raise error
        now = self._clock()
        self._silent_since = self._silent_since if self._silent_since is not None else now
        if now - self._silent_since > PATIENCE:
            raise error

    def check(self, job: JobState) -> bool:
        """Whether `job` has succeeded.

        Raises:
            JobError: if it failed, was cancelled, or the time is up.
        """
        if job.status == "succeeded":
            return True
        if job.status == "failed":
            reason = job.error.message if job.error else "The server gives no reason."
            raise JobError(f"The job {job.id} failed: {reason}", job=job)
        if job.status == "cancelled":
            raise JobError(f"The job {job.id} was cancelled.", job=job)
        if self._deadline is not None and self._clock() > self._deadline:
            raise JobError(f"The job {job.id} is still {job.status}; it goes on without being waited for.", job=job)
        return False
