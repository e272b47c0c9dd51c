"""The jobs that one worker has in its hands: what it asks of the registry, each in a transaction of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from tenora.control.jobs.lease_rows import Claim, Task, claim_next, end_dead, end_own, renew
from tenora.control.jobs.rows import PAUSED_LINE, log
from tenora.control.registry.database import Database, Session
from tenora.control.registry.presence import BEAT_SECONDS, Presence
from tenora.control.registry.tables import JobRow

__all__ = ["RENEW_SECONDS", "Claim", "Leases", "Task"]

RENEW_SECONDS = BEAT_SECONDS


class Leases:
    """Of the process `presence`, whose heartbeats somebody else sees to."""

    def __init__(self, database: Database, presence: Presence) -> None:
        self.owner = presence.id
        self._database = database

    async def claim(
        self,
        task: Task,
        busy: Collection[str],
        *,
        most_of_tenant: int | None = None,
        without: Collection[str] = (),
    ) -> Claim | None:
        """Take one job for `task`, fairly between tenants and never one that another living worker has; None: no job.

        Args:
            task: to prepare a job in `validating_files`, or to train one in `queued` or `running`.
            busy: ids of jobs that this worker is at still, so that it does not take one again whose lease ran out.
            most_of_tenant: a tenant of which workers have so many in hand for this task has to wait.
            without: methods whose jobs have to wait.
        """
        async with self._database.write(alone=False) as session:
            return await claim_next(session, self.owner, task, busy, most_of_tenant=most_of_tenant, without=without)

    async def renew(self, claims: Collection[Claim]) -> None:
        """Keep those that are still held for `presence.ALIVE_SECONDS` more; to be called every `RENEW_SECONDS`."""
        async with self._database.write(alone=False) as session:
            await renew(session, self.owner, claims)

    async def end_dead(self) -> int:
        """End the leases of processes that are dead, so that nobody waits for them to run out; how many there were."""
        async with self._database.write(alone=False) as session:
            ended = await end_dead(session)
            _say_paused(session, ended)
        return len(ended)

    async def end(self) -> None:
        """Let go of everything: this worker ends."""
        async with self._database.write(alone=False) as session:
            _say_paused(session, await end_own(session, self.owner))


def _say_paused(session: Session, ended: Sequence[JobRow]) -> None:
    """Whoever had these jobs in hand says no more when their runs have ended."""
    for row in ended:
        if row.status == "paused":
            log(session, row, PAUSED_LINE)
