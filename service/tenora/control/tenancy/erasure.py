"""The end of a tenant: its keys, what runs for it, every row that names it, and what those rows named on disk."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from tenora.control.registry.database import Database, Session
from tenora.control.tenancy.keys import Keys
from tenora.control.tenancy.rows import delete_tenant
from tenora.control.tenancy.tenants import DEFAULT_TENANT, Tenants
from tenora.errors import ConflictError

AfterCommit = Callable[[], Awaitable[None]]


class Work(Protocol):
    """What runs for tenants."""

    async def end_for(self, tenant_id: str) -> None:
        """End what runs for the tenant, whose keys are dead."""
        ...


class Holder(Protocol):
    """What holds more of a tenant than rows: files, places on the device."""

    async def forget(self, session: Session, tenant_id: str) -> AfterCommit:
        """Inside the transaction that is about to delete the tenant's rows: what is to go once it has committed."""
        ...


class Erasure:
    """Deletes tenants whole, and nothing of any other tenant.

    A process that dies half-way leaves either a tenant without keys, whose deletion is asked for again, or files that
    no row names, which the next start sweeps.
    """

    def __init__(
        self, database: Database, tenants: Tenants, keys: Keys, works: Sequence[Work], holders: Sequence[Holder]
    ) -> None:
        self._database = database
        self._tenants = tenants
        self._keys = keys
        self._works = works
        self._holders = holders

    async def erase(self, name: str) -> None:
        """Delete a tenant. Requests that were accepted finish; nothing else of it is left when this returns.

        Raises:
            NotFoundError: there is none of that name (any more).
            ConflictError: it is the default tenant, whose keys are the operator's.
        """
        if name == DEFAULT_TENANT:
            raise ConflictError(
                f"The tenant {DEFAULT_TENANT!r} is the operator's and stays; delete its files and adapters instead.",
                param="tenant",
            )
        tenant = await self._tenants.get(name)
        await self._keys.revoke_all(tenant.id)  # first: nothing new comes in
        for work in self._works:
            await work.end_for(tenant.id)
        async with self._database.write(frees=True) as session:
            left = [await holder.forget(session, tenant.id) for holder in self._holders]
            await delete_tenant(session, tenant.id)
        for let_go in left:
            await let_go()
        await self._database.restock()
