"""What the use cases of jobs ask of whoever works on them."""

from __future__ import annotations

from typing import Protocol


class JobQueue(Protocol):
    """The workers, as `tenora.control.jobs.jobs` sees them: a `JobRunner` here, or the line to one elsewhere."""

    @property
    def leases_lost(self) -> int:
        """Jobs that another process took because this one had let their lease run out."""
        ...

    @property
    def worker_up(self) -> bool | None:
        """Whether a worker is there; None where none is meant to be."""
        ...

    def wake(self) -> None:
        """There may be something to claim."""
        ...

    async def leave(self, tenant_id: str, job_id: str, *, pause: bool) -> None:
        """The job was taken from its worker: end its run, and without `pause` forget its files.

        With `pause` this returns when the run has ended and its events are recorded, or after a while.
        """
        ...
