"""Adapter blobs: stored once per content, shared by every row of any tenant that names the digest."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from tenora.adapters.arena_room import ArenaRoom
from tenora.adapters.digest import WEIGHTS_NAME
from tenora.adapters.heads import Head
from tenora.adapters.peft_format import read_config, summarise, validate_files
from tenora.adapters.ref import AdapterRef
from tenora.adapters.table_rows import TableRows
from tenora.adapters.weights import AdapterSummary
from tenora.control.adapters import rows
from tenora.control.registry.database import Database
from tenora.control.storage.directory import full_disk
from tenora.control.storage.object_store import VersionStore
from tenora.errors import AdapterFormatError, NotFoundError
from tenora.training.kinds.table import find_kind
from tenora.training.spec import LoraSpec, highest_rank

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine

_log = logging.getLogger(__name__)

_STORED_AT_ONCE = 4  # by each process: threads are left for everything else
_KEPT_SHAPES = 65536


@dataclass(frozen=True, slots=True)
class Blob:
    """A stored adapter: its digest and what its files say.

    Attributes:
        kind: what it is, a name of `tenora.adapters.kinds`.
        bytes: size of the weights in the file.
        device_bytes: what they take in the engine's arena.
    """

    digest: str
    kind: str
    rank: int
    target_modules: Sequence[str]
    bytes: int
    device_bytes: int


class Shape(NamedTuple):
    """What a version is to who serves it; what it takes in the engine's arena is in bytes."""

    kind: str
    highest_rank: int
    device_bytes: int
    heads: Sequence[Head] = ()


class Blobs:
    """The adapter store together with the rule that a blob lives as long as a row names it.

    A blob is stored before the row that names it and deleted after the last one is gone. One that is being published is
    not deleted between being stored and being named, and one that requests use not before they end: by no process, for
    each holds what it uses (`VersionStore.hold`). If the process dies meanwhile, the next start sweeps it.

    Attributes:
        store: where they lie.
        rows: those of the base that an adapter can fill.
        max_rank: highest rank that is accepted.
    """

    def __init__(
        self,
        database: Database,
        store: VersionStore,
        engine: AsyncEngine,
        rows: TableRows,
        max_rank: int,
    ) -> None:
        self.store = store
        self.rows = rows
        self.max_rank = max_rank
        self._database = database
        self._engine = engine
        self._lock = asyncio.Lock()  # of deleting
        self._storing = asyncio.Semaphore(_STORED_AT_ONCE)
        self._held: Counter[str] = Counter()  # digest → open blocks of `publishing` and `use`
        self._holds: dict[str, int] = {}  # digest that is held → descriptor that tells other processes
        self._postponed: set[str] = set()  # digests that were to be freed meanwhile
        self._going: set[str] = set()  # digests that are being deleted
        self._shapes: OrderedDict[str, Shape] = OrderedDict()  # by digest; they never change
        self._releases: set[asyncio.Task[None]] = set()

    @property
    def room(self) -> ArenaRoom:
        """The engine's memory for adapters."""
        ready = self._engine.ready
        return ArenaRoom(
            nbytes=ready.adapter_pool_bytes,
            slots=ready.adapter_slots,
            dtype=ready.dtype,
            keeps_bfloat16=ready.device == "cpu" and ready.dtype == "float32",
        )

    def ref(self, digest: str) -> AdapterRef:
        """What the engine needs to find a version, whether it is stored or not: a pin may meet a deletion."""
        return AdapterRef(digest=digest, path=str(self.store.path(digest)))

    def require_trainable(self, lora: LoraSpec) -> None:
        """Raise AdapterFormatError if an adapter of this shape, in float32, could never be served."""
        lora = msgspec.structs.replace(lora, rank=highest_rank(lora))
        ranks = find_kind(lora.type).ranks(self.rows, lora)
        widest = max(ranks[: self.rows.low_rank], default=0)
        if widest > self.max_rank:
            raise AdapterFormatError(
                f"The adapter would have ranks or bottlenecks of {widest}, and this server accepts up to "
                f"{self.max_rank}. Ask for narrower ones, or have the operator raise TENORA_MAX_LORA_RANK."
            )
        self.room.require(self.room.bytes_of(self.rows.numel(ranks)))

    async def device_bytes(self, digest: str) -> int:
        """What a stored version takes on the device; 0 if its files cannot be read, for then it is never there."""
        shape = await self.shape(digest)
        return 0 if shape is None else shape.device_bytes

    async def shape(self, digest: str) -> Shape | None:
        """What a stored version is; None if its files cannot be read."""
        if digest not in self._shapes:
            try:
                summary = await asyncio.to_thread(summarise, self.store.path(digest), self.rows, max_rank=self.max_rank)
            except (AdapterFormatError, OSError):
                return None
            return self._keep(digest, summary)
        return self._shapes[digest]

    @contextlib.contextmanager
    def use(self, digest: str) -> Iterator[None]:
        """Keep a blob for as long as the block runs, whatever becomes of the rows that name it.

        Raises:
            NotFoundError: it is not stored, or is being deleted.
        """
        if digest in self._going:
            raise NotFoundError(f"The adapter version {digest} was deleted.")
        if not self._held[digest]:
            self._holds[digest] = self.store.hold(digest)
        self._held[digest] += 1
        try:
            yield
        finally:
            self._let_go(digest)
            if digest in self._postponed and not self._held[digest]:
                self._release_soon(digest)

    async def settle(self) -> None:
        """Wait until what was postponed and may go by now is gone; what cannot go is swept at the next start."""
        for error in await asyncio.gather(*self._releases, return_exceptions=True):
            if isinstance(error, BaseException):
                _log.warning("an adapter's files stay until the next start", exc_info=error)

    @contextlib.asynccontextmanager
    async def publishing(self, directory: str) -> AsyncIterator[Blob]:
        """Check and store the PEFT directory; the block must commit a row that names the blob.

        If the block raises, a blob that no row names is removed again. Blocks may take their time, and so may copying
        and hashing: others publish and delete meanwhile.

        Raises:
            AdapterFormatError: not an adapter of this base; nothing was stored.
        """
        async with self._storing:
            blob, hold = await self._put(Path(directory))
        if self._held[blob.digest]:
            os.close(hold)
        else:
            self._holds[blob.digest] = hold
        self._held[blob.digest] += 1
        try:
            yield blob
        except BaseException:
            self._postponed.add(blob.digest)
            raise
        finally:
            self._let_go(blob.digest)
            if blob.digest in self._postponed:
                await self.release([blob.digest])

    async def release(self, digests: Collection[str]) -> None:
        """Rows that named these digests were deleted: free those that no row of any tenant names any more."""
        async with self._lock:
            await self._delete_unnamed(digests)

    async def release_postponed(self) -> None:
        """Free what another process held when its last row went, as far as it does not any more."""
        await self.release(set(self._postponed))

    async def sweep(self, older_than: float) -> int:
        """At start: remove blobs that no row names and that are older than `older_than` (Unix time); how many."""
        async with self._lock:
            async with self._database.read() as session:
                named = await rows.named(session)

            def is_old(digest: str) -> bool:
                with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                    return self.store.path(digest).lstat().st_mtime < older_than
                return False

            def orphans() -> list[str]:
                return [digest for digest in self.store.list() if digest not in named and is_old(digest)]

            swept = 0
            for digest in await asyncio.to_thread(orphans):
                # Old content may be published anew by another process at this moment.
                with self.store.alone(digest) as alone:
                    if alone and not await self._is_named(digest):
                        swept += await asyncio.to_thread(self.store.delete, digest)
            return swept

    def _let_go(self, digest: str) -> None:
        self._held -= Counter([digest])
        if not self._held[digest]:
            os.close(self._holds.pop(digest))

    async def _put(self, directory: Path) -> tuple[Blob, int]:
        """Store it; what it is, and a hold on it."""
        room = self.room

        def put() -> tuple[AdapterSummary, str]:
            weights = directory / WEIGHTS_NAME
            config = read_config(directory)
            summary = validate_files(config, weights, self.rows, max_rank=self.max_rank, room=room)
            with full_disk():
                return summary, self.store.put(directory)

        while True:
            storing = asyncio.ensure_future(asyncio.to_thread(put))
            try:
                summary, digest = await asyncio.shield(storing)
            except asyncio.CancelledError:
                storing.add_done_callback(self._left)
                raise
            try:
                hold = self.store.hold(digest)
            except NotFoundError:
                async with self._lock:  # the same content is being deleted at this moment: it is stored after that
                    continue
            break
        blob = Blob(
            digest=digest,
            kind=summary.kind,
            rank=summary.rank,
            target_modules=summary.target_modules,
            bytes=summary.nbytes,
            device_bytes=self._keep(digest, summary).device_bytes,
        )
        return blob, hold

    def _left(self, storing: asyncio.Future[tuple[AdapterSummary, str]]) -> None:
        """Nobody waits for what was stored just now, so no row will name it."""
        if not storing.cancelled() and storing.exception() is None:
            self._release_soon(storing.result()[1])

    def _release_soon(self, digest: str) -> None:
        release = asyncio.create_task(self.release([digest]), name="blob-release")
        self._releases.add(release)
        release.add_done_callback(self._releases.discard)

    def _keep(self, digest: str, summary: AdapterSummary) -> Shape:
        """Remember what a version is, of as many as were met last; others are read again."""
        device_bytes = self.room.bytes_of(summary.parameters, bfloat16=summary.bfloat16)
        shape = self._shapes[digest] = Shape(summary.kind, summary.rank, device_bytes, summary.heads)
        while len(self._shapes) > _KEPT_SHAPES:
            self._shapes.popitem(last=False)
        return shape

    async def _delete_unnamed(self, digests: Collection[str]) -> None:
        # Before rows are read: the block that holds one may commit the row that names it at any time after that.
        held = {digest for digest in digests if self._held[digest]}
        free = set(digests) - held
        self._postponed = (self._postponed - free) | held
        async with self._database.read() as session:
            named = await rows.named(session, free)
        for digest in free - named:
            with self.store.alone(digest) as alone:
                if alone and not self._held[digest]:
                    await self._delete_if_unnamed(digest)
                elif self.store.exists(digest):
                    self._postponed.add(digest)
        await self._database.restock()

    async def _delete_if_unnamed(self, digest: str) -> None:
        """Delete a version that nobody else can hold now; whoever held it until now may have named it meanwhile."""
        if await self._is_named(digest):
            return
        self._going.add(digest)  # nobody begins with it between here and its end
        try:
            await self._engine.evict(digest)
            await asyncio.to_thread(self.store.delete, digest)
        finally:
            self._going.discard(digest)

    async def _is_named(self, digest: str) -> bool:
        async with self._database.read() as session:
            return bool(await rows.named(session, {digest}))
