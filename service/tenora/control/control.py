"""The composition root of the control plane: what the API calls, built once and passed down."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import TYPE_CHECKING

from tenora.adapters.table_rows import TableRows
from tenora.config import Settings
from tenora.control.adapters.models import Models
from tenora.control.files.files import Files
from tenora.control.inference.inference import Inference
from tenora.control.inference.pooling import Pooler
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.estimates import Estimates
from tenora.control.jobs.jobs import Jobs
from tenora.control.jobs.leases import Leases
from tenora.control.jobs.previews import Previews
from tenora.control.jobs.queue import JobQueue
from tenora.control.registry.presence import Presence
from tenora.control.storage.directory import WORKER_LOCK, claim, seat, vacant_seat
from tenora.control.tenancy.access import Access
from tenora.control.tenancy.bootstrap import Bootstrap, Registry
from tenora.control.tenancy.erasure import Erasure
from tenora.control.tenancy.idempotency import Idempotency
from tenora.control.worker.membership import Membership
from tenora.control.worker.runner import JobRunner
from tenora.errors import UnavailableError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine
    from tenora.model.catalog import ResolvedModel
    from tenora.model.tokenizer import Tokenizer

__all__ = ["Bootstrap", "Control", "Registry"]

_log = logging.getLogger(__name__)


class Control:
    """Everything that the API calls.

    `control = await Control.open(…)`, `await control.start()`, … `control.begin_drain()`, … `await control.close()`,
    and only then `await engine.close(…)`: runs are paused through the engine.

    Attributes:
        access: what a key may do; whoever calls a use case has asked it, and hooks of its are told.
        bootstrap: what became of the default tenant's admin key; its `secret` is there to be printed once.
        draining: no new generation and no new job is taken.
    """

    def __init__(
        self,
        registry: Registry,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        model: ResolvedModel,
        rows: TableRows,
        bootstrap: Bootstrap,
        presence: Presence,
        lock: int | None,
        queue: JobQueue | None,
    ) -> None:
        settings, database = registry.settings, registry.database
        self.settings = settings
        self.engine = engine
        self.bootstrap = bootstrap
        self.draining = False
        self.access = Access()
        self.keys = registry.keys
        self.tenants = registry.tenants
        self.idempotency = Idempotency(database, presence)
        self._registry = registry
        self._lock = lock
        context = JobContext.of(registry, engine, tokenizer, model, rows)
        self._blobs = blobs = context.blobs
        tokenizing = context.tokenizing
        storage, limits = context.storage, context.limits
        self.files = Files(settings, database, storage, tokenizing, context.failpoints)
        self.previews = Previews(settings, database, storage, tokenizing, limits)
        self.estimates = Estimates(database, storage, blobs, tokenizing, limits)
        self.adapters = context.adapters
        self.models = Models(database, self.adapters, engine, model.id, int(model.directory.stat().st_mtime))
        self.inference = Inference(database, blobs, engine, tokenizing, model.id, self._admit)
        self.pooling = Pooler(self.inference, blobs)
        self._runner: JobRunner | None = None
        if queue is None:
            queue = self._runner = JobRunner(context, Leases(database, presence))
        self._membership = Membership(registry, presence, context, self._runner)
        self.jobs = Jobs(database, blobs, queue, limits, self._admit, context.failpoints)
        self.erasure = Erasure(
            database, self.tenants, self.keys, [self.jobs], [self.adapters, self.files, self.inference]
        )

    @classmethod
    async def open(
        cls,
        settings: Settings,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        model: ResolvedModel,
        rows: TableRows,
        *,
        claimed: bool = False,
        queue: JobQueue | None = None,
    ) -> Control:
        """Open the state directory, migrate the registry, sweep what a dead process left, make the bootstrap key.

        Args:
            claimed: the caller holds the state directory (`storage.claim`), before and beyond this object's life.
            queue: the line to a worker in a process of its own; None: this one works on jobs itself.

        Raises:
            ConfigurationError: the directory is in use, or the database is damaged or cannot be used.
        """
        started = time.time()
        registry = await Registry.open(settings)
        lock: int | None = None
        try:
            lock = None if claimed else await asyncio.to_thread(claim, settings.root)
            await registry.database.check()
            presence = Presence(registry.database, await asyncio.to_thread(seat, settings.root))
            await presence.begin()
            bootstrap = await registry.bootstrap()
            if (dead := await asyncio.to_thread(vacant_seat, settings.root, WORKER_LOCK)) is not None:
                await presence.vacate(dead)
            control = await asyncio.to_thread(
                cls, registry, engine, tokenizer, model, rows, bootstrap, presence, lock, queue
            )
            await control.sweep(min(started, await presence.oldest_start()))
        except BaseException:
            await registry.close()
            if lock is not None:
                os.close(lock)
            raise
        return control

    async def start(self) -> None:
        """Pin what is pinned, and begin to work on jobs if no other process does. The engine has started."""
        await self.adapters.pins.restore()
        await self._membership.start(self.files.delete_expired)

    async def close(self) -> None:
        """Pause what runs, so that the next start goes on, and let go of the state directory."""
        self.begin_drain()
        await self._membership.close()
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def ready(self) -> bool:
        """Whether requests are taken and will be answered."""
        return not self.draining and not self.damaged and self.engine.healthy

    @property
    def damaged(self) -> bool:
        """Whether the registry seems damaged."""
        return self._registry.database.damaged

    def begin_drain(self) -> None:
        """Take no new generation and no new job from now on; what runs goes on."""
        self.draining = True

    def _admit(self) -> None:
        if self.draining:
            raise UnavailableError("The server is shutting down; send the request again.", code="draining")

    async def sweep(self, started: float) -> None:
        """Remove half-written and unnamed blobs that are older than `started` (Unix time); `open` does it."""
        staged = await asyncio.to_thread(self._registry.storage.sweep_staging, started)
        files = await self.files.sweep(started)
        adapters = await self._blobs.sweep(started)
        await self.idempotency.forget_dead()
        if staged or files or adapters:
            _log.info("swept %d staged uploads, %d files and %d adapters without a row", staged, files, adapters)
