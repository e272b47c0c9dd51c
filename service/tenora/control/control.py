"""The composition root of the control plane: what the API calls, built once and passed down."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from tenora.adapters.store import AdapterStore
from tenora.adapters.targets import TargetModule
from tenora.config import Settings
from tenora.control.adapters.adapters import Adapters
from tenora.control.adapters.blobs import Blobs
from tenora.control.adapters.models import Models
from tenora.control.files.files import Files
from tenora.control.inference.inference import Inference
from tenora.control.jobs.context import JobContext
from tenora.control.jobs.estimates import Estimates
from tenora.control.jobs.jobs import Jobs
from tenora.control.jobs.leases import Leases
from tenora.control.jobs.previews import Previews
from tenora.control.jobs.shape import Limits
from tenora.control.registry.presence import Presence
from tenora.control.storage.directory import claim, seat
from tenora.control.storage.failpoints import Failpoints
from tenora.control.tenancy.access import Access
from tenora.control.tenancy.bootstrap import Bootstrap, Registry
from tenora.control.tenancy.erasure import Erasure
from tenora.control.tenancy.idempotency import Idempotency
from tenora.control.tokenizing.threads import Tokenizing
from tenora.control.worker.runner import JobRunner
from tenora.errors import TenoraError, UnavailableError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine
    from tenora.model.catalog import ResolvedModel
    from tenora.model.tokenizer import Tokenizer

__all__ = ["Bootstrap", "Control", "Registry"]

_log = logging.getLogger(__name__)

HOUSEKEEPING_SECONDS = 600.0


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
        targets: Sequence[TargetModule],
        bootstrap: Bootstrap,
        presence: Presence,
        lock: int | None,
    ) -> None:
        settings, database, storage = registry.settings, registry.database, registry.storage
        self.settings = settings
        self.engine = engine
        self.bootstrap = bootstrap
        self.draining = False
        self.access = Access()
        self.keys = registry.keys
        self.tenants = registry.tenants
        self.idempotency = Idempotency(database, presence)
        self._registry = registry
        self._presence = presence
        self._lock = lock
        self._base_id = model.id
        self._target_names = tuple(dict.fromkeys(target.name for target in targets))
        self._background: list[asyncio.Task[None]] = []
        failpoints = Failpoints.parse(settings.failpoints)
        if failpoints.armed:
            _log.warning("failpoints are armed: %s", ", ".join(sorted(failpoints.armed)))
        self._tokenizing = Tokenizing(tokenizer)
        store = AdapterStore(storage.adapters)
        self._blobs = Blobs(database, store, engine, targets, settings.max_lora_rank)
        self.files = Files(settings, database, storage, self._tokenizing, failpoints)
        self.previews = Previews(settings, database, storage, self._tokenizing, self._limits)
        self.estimates = Estimates(database, storage, self._blobs, self._tokenizing, self._limits)
        self.adapters = Adapters(settings, database, storage, self._blobs, engine, model.id, failpoints)
        self.models = Models(database, self.adapters, engine, model.id, int(model.directory.stat().st_mtime))
        self.inference = Inference(database, self._blobs, engine, self._tokenizing, model.id, self._admit)
        context = JobContext(
            settings,
            database,
            storage,
            self._blobs,
            self.adapters,
            engine,
            self._tokenizing,
            model,
            self._limits,
            failpoints,
        )
        self._runner = JobRunner(context, Leases(database, presence))
        self.jobs = Jobs(database, self._blobs, self._runner, self._limits, self._admit, failpoints)
        self.erasure = Erasure(database, self.tenants, self.keys, [self.jobs], [self.adapters, self.files])

    @classmethod
    async def open(
        cls,
        settings: Settings,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        model: ResolvedModel,
        targets: Sequence[TargetModule],
        *,
        claimed: bool = False,
    ) -> Control:
        """Open the state directory, migrate the registry, sweep what a dead process left, make the bootstrap key.

        Args:
            claimed: the caller holds the state directory (`storage.claim`), before and beyond this object's life.

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
            control = await asyncio.to_thread(
                cls, registry, engine, tokenizer, model, targets, bootstrap, presence, lock
            )
            await control.sweep(min(started, await presence.oldest_start()))
        except BaseException:
            await registry.close()
            if lock is not None:
                os.close(lock)
            raise
        return control

    async def start(self) -> None:
        """Begin to work on jobs, take over those of a dead process, and pin what is pinned. The engine has started."""
        await self.adapters.pins.restore()
        await self._runner.start()
        self._background = [
            asyncio.create_task(self._keep_house(), name="control-housekeeping"),
            asyncio.create_task(self._registry.database.watch(), name="registry-watch"),
            asyncio.create_task(self._presence.keep(), name="presence"),
        ]

    async def close(self) -> None:
        """Pause what runs, so that the next start goes on, and let go of the state directory."""
        self.begin_drain()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        try:
            await self._runner.stop()
            await self._presence.end()
        except TenoraError as error:
            # A full disk, or a damaged registry: the leases run out by themselves.
            _log.warning("that the jobs pause was not recorded: %s", error.message)
        self._tokenizing.close()
        await self._blobs.settle()
        await self._registry.close()
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

    def _limits(self) -> Limits:
        return Limits(
            base_id=self._base_id,
            max_rank=self.settings.max_lora_rank,
            max_model_len=self.engine.ready.max_model_len,
            target_modules=self._target_names,
            fits=self._blobs.require_trainable,
        )

    async def sweep(self, started: float) -> None:
        """Remove half-written and unnamed blobs that are older than `started` (Unix time); `open` does it."""
        staged = await asyncio.to_thread(self._registry.storage.sweep_staging, started)
        files = await self.files.sweep(started)
        adapters = await self._blobs.sweep(started)
        await self.idempotency.forget_dead()
        if staged or files or adapters:
            _log.info("swept %d staged uploads, %d files and %d adapters without a row", staged, files, adapters)

    async def _keep_house(self) -> None:
        while True:
            try:
                await self.files.delete_expired()
            except TenoraError:
                _log.exception("expired files could not be removed; trying again later")
            await asyncio.sleep(HOUSEKEEPING_SECONDS)
