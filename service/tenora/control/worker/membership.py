"""What every process does that shares the registry, a service as well as a worker, for as long as it is there."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from tenora.control.jobs.context import JobContext
from tenora.control.jobs.leases import Leases
from tenora.control.registry.presence import Presence
from tenora.control.tenancy.bootstrap import Registry
from tenora.control.tenancy.idempotency import Idempotency
from tenora.control.worker.runner import JobRunner
from tenora.errors import TenoraError

_log = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0


class Membership:
    """Heartbeats, a look at the database's health, and what the dead and the deleted leave is swept; work, if any.

    Attributes:
        presence: of this process.
        runner: works on jobs in this process; None: it does not.
    """

    def __init__(self, registry: Registry, presence: Presence, context: JobContext, runner: JobRunner | None) -> None:
        """Nothing happens before `start`; the presence has begun."""
        self.presence = presence
        self.runner = runner
        self._registry = registry
        self._context = context
        leases, idempotency = Leases(registry.database, presence), Idempotency(registry.database, presence)
        self._chores: list[Callable[[], Awaitable[object]]] = [
            context.blobs.release_postponed,
            leases.end_dead,
            idempotency.forget_dead,
            presence.forget_dead,
        ]
        self._background: list[asyncio.Task[None]] = []

    async def start(self, *chores: Callable[[], Awaitable[object]]) -> None:
        """Begin to work, and to keep house: `chores` are done at once and every `SWEEP_SECONDS`, with everybody's."""
        self._chores += chores
        if self.runner is not None:
            await self.runner.start()
        self._background = [
            asyncio.create_task(self._sweep(), name="sweep"),
            asyncio.create_task(self._registry.database.watch(), name="registry-watch"),
            asyncio.create_task(self.presence.keep(), name="presence"),
        ]

    async def close(self) -> None:
        """Pause what runs, so that the next start goes on, and leave."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        try:
            if self.runner is not None:
                await self.runner.stop()
            await self.presence.end()
        except TenoraError as error:
            # A full disk, or a damaged registry: the leases run out by themselves.
            _log.warning("that the jobs pause was not recorded: %s", error.message)
        self._context.tokenizing.close()
        await self._context.blobs.settle()
        await self._registry.close()

    async def _sweep(self) -> None:
        while True:
            for chore in self._chores:
                try:
                    await chore()
                except TenoraError:
                    _log.exception("what nobody names any more could not be removed; trying again later")
            await asyncio.sleep(SWEEP_SECONDS)
