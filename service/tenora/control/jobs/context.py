"""What the work on a job needs, and the two ways in which it ends early."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from tenora.adapters.store import AdapterStore
from tenora.adapters.table_rows import TableRows
from tenora.config import Settings
from tenora.control.adapters.adapters import Adapters
from tenora.control.adapters.blobs import Blobs
from tenora.control.jobs.lease_rows import Claim, owned
from tenora.control.jobs.rows import end, log
from tenora.control.jobs.shape import Limits
from tenora.control.registry.database import Database
from tenora.control.storage.directory import Storage
from tenora.control.storage.failpoints import Failpoints
from tenora.control.tenancy.bootstrap import Registry
from tenora.control.tokenizing.threads import Tokenizing
from tenora.engine.apart import ApartTrainer, Trainer
from tenora.errors import TenoraError
from tenora.training.full.memory import require_memory

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine
    from tenora.model.catalog import ResolvedModel
    from tenora.model.tokenizer import Tokenizer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class JobContext:
    """The collaborators of a worker. `limits` is called when needed: it asks the engine for its context length."""

    settings: Settings
    database: Database
    storage: Storage
    blobs: Blobs
    adapters: Adapters
    engine: AsyncEngine
    apart: Trainer
    tokenizing: Tokenizing
    model: ResolvedModel
    limits: Callable[[], Limits]
    failpoints: Failpoints

    @classmethod
    def of(
        cls,
        registry: Registry,
        engine: AsyncEngine,
        tokenizer: Tokenizer,
        model: ResolvedModel,
        rows: TableRows,
    ) -> JobContext:
        """Everything over an open registry, for a worker, or for a service whose worker shares its process."""
        settings, database, storage = registry.settings, registry.database, registry.storage
        failpoints = Failpoints.parse(settings.failpoints)
        if failpoints.armed:
            _log.warning("failpoints are armed: %s", ", ".join(sorted(failpoints.armed)))
        blobs = Blobs(database, AdapterStore(storage.adapters), engine, rows, settings.max_lora_rank)
        names = tuple(dict.fromkeys(module.name for module in rows.modules))

        def limits() -> Limits:
            return Limits(
                base_id=model.id,
                max_rank=settings.max_lora_rank,
                max_model_len=engine.ready.max_model_len,
                target_modules=names,
                fits=blobs.require_trainable,
                admit_whole=partial(require_memory, model.directory),
            )

        adapters = Adapters(settings, database, storage, blobs, engine, model.id, failpoints)
        return cls(
            settings,
            database,
            storage,
            blobs,
            adapters,
            engine,
            ApartTrainer(settings, model.directory),
            Tokenizing(tokenizer),
            model,
            limits,
            failpoints,
        )

    async def fail(self, claim: Claim, error: TenoraError) -> None:
        """End the job with an error that its owner can read."""
        async with self.database.write() as session:
            row = await owned(session, claim)
            end(
                row, "failed", {"code": error.code or "training_failed", "message": error.message, "param": error.param}
            )
            log(session, row, f"The job failed: {error.message}", level="error")
