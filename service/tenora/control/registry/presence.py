"""Which processes share the registry and are alive: each says so by its heartbeat, on the database's clock."""

from __future__ import annotations

import asyncio
import logging
import time

from sqlalchemy import Select, delete, func, select, update

from tenora.control.registry.database import Database, Session
from tenora.control.registry.dialects.dialect import unix_time
from tenora.control.registry.ids import new_id
from tenora.control.registry.tables import ProcessRow
from tenora.errors import TenoraError

_log = logging.getLogger(__name__)

ALIVE_SECONDS = 30  # a process without a heartbeat for so long is taken for dead
BEAT_SECONDS = ALIVE_SECONDS / 3
_KEPT_SECONDS = 24 * 3600  # of dead ones, for whoever looks what has been


class Presence:
    """This process among them.

    `await presence.begin()`, then `keep()` as a task or `beat()` about every `BEAT_SECONDS`, `await presence.end()`.

    Attributes:
        id: of this process; fresh at each start.
    """

    def __init__(self, database: Database, seat: str) -> None:
        """Nothing is written before `begin`.

        Args:
            database: the registry.
            seat: what only one living process has at a time (`tenora.control.storage.directory.seat`): whoever had it
                before is known to be dead, and need not be waited for.
        """
        self.id = new_id("boot")
        self._database = database
        self._seat = seat
        self._started = time.time()

    async def begin(self) -> None:
        """Be one of them, in place of whoever had this seat."""
        async with self._database.write() as session:
            await session.execute(delete(ProcessRow).where(ProcessRow.seat == self._seat))
            await self._beat(session)

    async def vacate(self, seat: str) -> None:
        """Whoever had this seat is known to be dead."""
        async with self._database.write(alone=False) as session:
            await session.execute(delete(ProcessRow).where(ProcessRow.seat == seat))

    async def forget_dead(self) -> None:
        """Remove those that died long ago."""
        async with self._database.write(alone=False) as session:
            await session.execute(delete(ProcessRow).where(ProcessRow.alive_until < unix_time() - _KEPT_SECONDS))

    async def beat(self) -> None:
        """Stay alive for `ALIVE_SECONDS` from now."""
        async with self._database.write(alone=False) as session:
            await self._beat(session)

    async def keep(self) -> None:
        """Give heartbeats until cancelled."""
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            try:
                await self.beat()
            except TenoraError as error:
                _log.warning("no heartbeat could be given: %s", error.message)

    async def end(self) -> None:
        """Be one of them no more."""
        async with self._database.write(alone=False) as session:
            await session.execute(delete(ProcessRow).where(ProcessRow.id == self.id))

    async def oldest_start(self) -> float:
        """When the oldest living process started (Unix time): what is older than that, nobody is about to name."""
        async with self._database.read() as session:
            found = await session.scalar(
                select(func.min(ProcessRow.started_at)).where(
                    ProcessRow.alive_until >= unix_time(), ProcessRow.id != self.id
                )
            )
        return self._started if found is None else min(float(found), self._started)

    async def _beat(self, session: Session) -> None:
        beat = (
            update(ProcessRow)
            .where(ProcessRow.id == self.id)
            .values(alive_until=unix_time() + ALIVE_SECONDS)
            .returning(ProcessRow.id)
        )
        if await session.scalar(beat) is None:
            row = ProcessRow(id=self.id, seat=self._seat, started_at=int(self._started))
            row.alive_until = unix_time() + ALIVE_SECONDS
            session.add(row)


def living() -> Select[str]:
    """The ids of the processes that are alive."""
    return select(ProcessRow.id).where(ProcessRow.alive_until >= unix_time())
