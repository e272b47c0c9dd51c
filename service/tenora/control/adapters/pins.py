"""Pins: adapters that keep their place on the device, as far as everybody else's still find one.

The rule: the pins of all tenants together take at most half of the slots and half of the pool, and leave room for the
largest adapter that is stored. A change that would break it is refused and not stored. If a smaller pool breaks it, the
newest pins are reported at start and not kept on the device.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection
from typing import TYPE_CHECKING

from tenora.adapters.digest import damaged
from tenora.control.adapters import rows
from tenora.control.adapters.blobs import Blob, Blobs
from tenora.control.registry.database import Database, Session
from tenora.control.registry.tables import AdapterRow
from tenora.errors import ConflictError

if TYPE_CHECKING:
    from tenora.engine.client.client import AsyncEngine

_log = logging.getLogger(__name__)


class Pins:
    """What the registry says of pins, and the engine told of it."""

    def __init__(self, database: Database, blobs: Blobs, engine: AsyncEngine) -> None:
        self._database = database
        self._blobs = blobs
        self._engine = engine

    async def require_intact(self, digest: str) -> None:
        """Before the transaction that pins `digest`, because all of its bytes are read: raise unless it can be read.

        Raises:
            AdapterDamagedError: its files are not what was stored.
        """
        if not await asyncio.to_thread(self._blobs.store.verify, digest):
            raise damaged(digest)

    async def require_allowed(self, session: Session) -> None:
        """Inside a transaction that pins, or moves a pinned alias: raise unless what is pinned now can be kept.

        Raises:
            ConflictError: code pins_full; all pins together would take too much.
        """
        await session.flush()
        if (reason := await self._too_much(session, await rows.pinned(session))) is not None:
            raise ConflictError(f"The adapter cannot be pinned: {reason}", code="pins_full")

    async def require_room_beside(self, session: Session, blob: Blob) -> None:
        """Raise ConflictError (code pins_full) if an adapter fits the pool, but not beside what is pinned."""
        pinned = set(await rows.pinned(session)) - {blob.digest}
        taken, pool = await self._size(pinned), self._blobs.room.nbytes
        if taken + blob.device_bytes > pool:
            raise ConflictError(
                f"The adapter takes {blob.device_bytes} bytes on the device, and pinned adapters leave "
                f"{pool - taken} of the pool's {pool}: it could not be served. Unpin adapters, or train a lower rank.",
                code="pins_full",
            )

    async def of(self, session: Session, tenant_id: str) -> Collection[str]:
        """The digests that a tenant's aliases pin."""
        return await rows.pinned(session, tenant_id)

    async def keep(self, digest: str) -> None:
        """Tell the engine to keep a version; its pin is committed."""
        await self._engine.pin(self._blobs.ref(digest))

    async def let_go(self, digest: str) -> None:
        """Tell the engine to keep a version no longer, unless another alias, of any tenant, still pins it."""
        async with self._database.read() as session:
            still = await rows.is_pinned(session, digest)
        if not still:
            await self._engine.pin(self._blobs.ref(digest), pinned=False)

    async def end_beyond_room(self, session: Session, alias: AdapterRow) -> str | None:
        """Inside the transaction that moves a pinned alias where nobody can be told no: end the pin if it cannot stay.

        Returns:
            Why it ends; None if it stays.
        """
        await session.flush()
        reason = await self._too_much(session, await rows.pinned(session))
        if reason is not None:
            alias.pinned = False
        return reason

    async def move(self, old: str, new: str) -> None:
        """A pinned alias moved from one version to another; that the new one may be kept was asked before."""
        await self.keep(new)
        if old != new:
            await self.let_go(old)

    async def restore(self) -> None:
        """At start: tell the engine of every pin, of all tenants, that the pool still has room for; oldest first."""
        async with self._database.read() as session:
            kept: set[str] = set()
            for digest in await rows.pinned(session):
                if (reason := await self._too_much(session, {*kept, digest})) is not None:
                    _log.warning("a pin is not kept: %s", reason, extra={"digest": digest})
                    continue
                kept.add(digest)
                await self.keep(digest)

    async def _too_much(self, session: Session, pinned: Collection[str]) -> str | None:
        """Why these may not be pinned together, and what to do; None if they may."""
        room = self._blobs.room
        advice = "Unpin another one, or have the operator raise"
        if len(pinned) > room.slots // 2:
            return (
                f"{len(pinned)} adapters would be pinned, and pins may take half of the {room.slots} slots. "
                f"{advice} TENORA_MAX_ADAPTERS."
            )
        size = await self._size(pinned)
        if size > room.nbytes // 2:
            return (
                f"pinned adapters would take {size} bytes, and they may take half of the pool's {room.nbytes}. "
                f"{advice} TENORA_ADAPTER_POOL_BYTES."
            )
        largest = await self._largest(session, pinned)
        if size + largest > room.nbytes:
            return (
                f"pinned adapters would take {size} of the pool's {room.nbytes} bytes, and the largest adapter needs "
                f"{largest}. {advice} TENORA_ADAPTER_POOL_BYTES."
            )
        return None

    async def _size(self, digests: Collection[str]) -> int:
        return sum([await self._blobs.device_bytes(digest) for digest in digests])

    async def _largest(self, session: Session, pinned: Collection[str]) -> int:
        """What the largest adapter that is not pinned takes, if that is more than pins always leave."""
        half = self._blobs.room.nbytes // 2
        # In the arena no weight takes more than twice its bytes in the file, so the others need not be looked at.
        candidates = await rows.digests_above(session, half / 2)
        sizes = [await self._blobs.device_bytes(digest) for digest in candidates if digest not in pinned]
        return max(sizes, default=0)
