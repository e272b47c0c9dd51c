"""Adapter blobs: stored once per content, shared by every row of any tenant that names the digest."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import select, union
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.adapters.digest import WEIGHTS_NAME
from tenora.adapters.peft_format import read_config, validate_files
from tenora.adapters.store import AdapterStore
from tenora.adapters.targets import TargetModule
from tenora.control.database import Database
from tenora.control.records import TERMINAL
from tenora.control.schema import AdapterVersionRow, CheckpointRow, JobRow
from tenora.control.storage import full_disk

if TYPE_CHECKING:
    from tenora.engine.client import AsyncEngine


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored adapter: its digest and what its files say. `bytes` is the size of the weights."""

    digest: str
    rank: int
    target_modules: Sequence[str]
    bytes: int


class Blobs:
    """The adapter store together with the rule that a blob lives as long as a row names it.

    A blob is stored before the row that names it and deleted after the last one is gone. One that is being published is
    not deleted between being stored and being named.

    Attributes:
        store: where they lie.
        targets: the base's modules.
        max_rank: highest rank that is accepted.
    """

    def __init__(
        self,
        database: Database,
        store: AdapterStore,
        engine: AsyncEngine,
        targets: Sequence[TargetModule],
        max_rank: int,
    ) -> None:
        self.store = store
        self.targets = targets
        self.max_rank = max_rank
        self._database = database
        self._engine = engine
        self._lock = asyncio.Lock()  # of storing and deleting
        self._publishing: Counter[str] = Counter()  # digest → blocks of `publishing` that may still name it
        self._postponed: set[str] = set()  # digests that were to be freed meanwhile

    @contextlib.asynccontextmanager
    async def publishing(self, directory: Path) -> AsyncIterator[Blob]:
        """Check and store the PEFT directory; the block must commit a row that names the blob.

        If the block raises, a blob that no row names is removed again. Blocks may take their time: others publish
        meanwhile.

        Raises:
            AdapterFormatError: not an adapter of this base; nothing was stored.
        """
        async with self._lock:
            blob = await asyncio.to_thread(self._put, directory)
            self._publishing[blob.digest] += 1
        try:
            yield blob
        except BaseException:
            self._postponed.add(blob.digest)
            raise
        finally:
            self._publishing -= Counter([blob.digest])
            if blob.digest in self._postponed:
                self._postponed.discard(blob.digest)
                await self.release([blob.digest])

    async def release(self, digests: Iterable[str]) -> None:
        """Rows that named these digests were deleted: free those that no row of any tenant names any more."""
        async with self._lock:
            await self._delete_unnamed(digests)

    async def sweep(self, older_than: float) -> int:
        """At start: remove blobs that no row names and that are older than `older_than` (Unix time); how many."""
        async with self._lock:
            async with self._database.read() as session:
                named = await _named(session)

            def remove_orphans() -> int:
                orphans = [
                    digest
                    for digest in self.store.list()
                    if digest not in named and self.store.path(digest).lstat().st_mtime < older_than
                ]
                for digest in orphans:
                    self.store.delete(digest)
                return len(orphans)

            return await asyncio.to_thread(remove_orphans)

    def _put(self, directory: Path) -> Blob:
        summary = validate_files(read_config(directory), directory / WEIGHTS_NAME, self.targets, max_rank=self.max_rank)
        with full_disk():
            digest = self.store.put(directory)
        return Blob(digest=digest, rank=summary.rank, target_modules=summary.target_modules, bytes=summary.nbytes)

    async def _delete_unnamed(self, digests: Iterable[str]) -> None:
        async with self._database.read() as session:
            named = await _named(session, set(digests))
        for digest in set(digests) - named:
            if self._publishing[digest]:
                self._postponed.add(digest)
                continue
            await self._engine.evict(digest)
            await asyncio.to_thread(self.store.delete, digest)


async def _named(session: AsyncSession, among: set[str] | None = None) -> set[str]:
    """Digests that a row of any tenant names; the only query across tenants besides those at start."""
    versions, checkpoints = select(AdapterVersionRow.digest), select(CheckpointRow.digest)
    # What an unfinished job starts from is read when its run begins, and again when it goes on after a restart.
    parents = select(JobRow.parent_digest).where(
        JobRow.parent_digest.is_not(None), JobRow.status.not_in(sorted(TERMINAL))
    )
    if among is not None:
        versions = versions.where(AdapterVersionRow.digest.in_(among))
        checkpoints = checkpoints.where(CheckpointRow.digest.in_(among))
        parents = parents.where(JobRow.parent_digest.in_(among))
    return set(await session.scalars(union(versions, checkpoints, parents)))
