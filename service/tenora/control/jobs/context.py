"""What the work on a job needs, and the two ways in which it ends early."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tenora.config import Settings
from tenora.control.adapters.adapters import Adapters
from tenora.control.adapters.blobs import Blobs
from tenora.control.jobs.lease_rows import Claim, owned
from tenora.control.jobs.rows import end, log
from tenora.control.jobs.shape import Limits
from tenora.control.registry.database import Database
from tenora.control.storage.directory import Storage
from tenora.control.storage.failpoints import Failpoints
from tenora.control.tokenizing.threads import Tokenizing
from tenora.errors import TenoraError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine
    from tenora.model.catalog import ResolvedModel


@dataclass(frozen=True, slots=True)
class JobContext:
    """The collaborators of a worker. `limits` is called when needed: it asks the engine for its context length."""

    settings: Settings
    database: Database
    storage: Storage
    blobs: Blobs
    adapters: Adapters
    engine: AsyncEngine
    tokenizing: Tokenizing
    model: ResolvedModel
    limits: Callable[[], Limits]
    failpoints: Failpoints

    async def fail(self, claim: Claim, error: TenoraError) -> None:
        """End the job with an error that its owner can read."""
        async with self.database.write() as session:
            row = await owned(session, claim)
            end(
                row, "failed", {"code": error.code or "training_failed", "message": error.message, "param": error.param}
            )
            log(session, row, f"The job failed: {error.message}", level="error")
