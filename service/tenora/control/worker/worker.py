"""The worker's composition: what a process needs that takes jobs to their adapters and serves nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from tenora.adapters.table_rows import TableRows
from tenora.config import Settings
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.leases import Leases
from tenora.control.jobs.queue import JobQueue
from tenora.control.registry.presence import Presence
from tenora.control.storage.directory import WORKER_LOCK, seat
from tenora.control.tenancy.bootstrap import Registry
from tenora.control.worker.membership import Membership
from tenora.control.worker.runner import JobRunner

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine
    from tenora.model.catalog import ResolvedModel
    from tenora.model.tokenizer import Tokenizer


class Worker:
    """Works on the jobs of one registry.

    `worker = await Worker.open(…)`, `await worker.start()`, … `await worker.close()`, and only then the engine's client
    is closed: runs are paused through it.
    """

    def __init__(
        self, registry: Registry, presence: Presence, context: JobContext, tell_lost: Callable[[int], None]
    ) -> None:
        self._runner = JobRunner(context, Leases(registry.database, presence), tell_lost)
        self._membership = Membership(registry, presence, context, self._runner)

    @classmethod
    async def open(
        cls,
        settings: Settings,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        model: ResolvedModel,
        rows: TableRows,
        tell_lost: Callable[[int], None],
    ) -> Worker:
        """Open the registry, as the holder of WORKER_LOCK.

        `tell_lost` hears how many jobs were taken from this worker, whenever that changes.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        registry = await Registry.open(settings)
        try:
            presence = Presence(registry.database, await asyncio.to_thread(seat, settings.root, WORKER_LOCK))
            await presence.begin()
            context = await asyncio.to_thread(JobContext.of, registry, engine, tokenizer, model, rows)
        except BaseException:
            await registry.close()
            raise
        return cls(registry, presence, context, tell_lost)

    @property
    def queue(self) -> JobQueue:
        """How jobs are brought to it and taken from it."""
        return self._runner

    async def start(self) -> None:
        """Take over the jobs of a dead worker and begin. An engine has been there."""
        await self._membership.start()

    async def retire(self) -> None:
        """The service is gone: finish what is being prepared, and nothing else."""
        await self._runner.retire()

    async def close(self) -> None:
        """Pause what runs, so that the next worker goes on."""
        await self._membership.close()
