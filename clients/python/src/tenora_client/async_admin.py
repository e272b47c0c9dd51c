"""Tenants and their keys, of the asynchronous client: for the operator, a key of the default tenant with `admin`."""

from __future__ import annotations

from collections.abc import Sequence

from tenora_client import calls
from tenora_client.async_connection import AsyncConnection
from tenora_client.async_paging import AsyncPages
from tenora_client.models import ApiKey, Deleted, NewApiKey, Tenant


class AsyncTenants:
    """Tenants."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(self, name: str) -> Tenant:
        """Add a tenant, which has no keys yet."""
        return await self._connection.send(calls.create_tenant(name))

    async def get(self, name: str) -> Tenant:
        """One tenant."""
        return await self._connection.send(calls.get_tenant(name))

    async def update(self, name: str, *, weight: float) -> Tenant:
        """Give a tenant another share of the workers beside others, 0.01 to 100; usual is 1."""
        return await self._connection.send(calls.update_tenant(name, weight))

    async def delete(self, name: str) -> Deleted:
        """Delete a tenant with its keys, jobs, files and adapters; requests that were accepted finish."""
        return await self._connection.send(calls.delete_tenant(name))

    def list(self) -> AsyncPages[Tenant]:
        """All tenants, by name."""
        return AsyncPages(lambda _: self._connection.send(calls.list_tenants()))


class AsyncKeys:
    """Keys of tenants."""

    def __init__(self, connection: AsyncConnection) -> None:
        self._connection = connection

    async def create(
        self, tenant: str, scopes: Sequence[str], *, name: str | None = None, expires_in: int | None = None
    ) -> NewApiKey:
        """Make a key; its secret is in this answer and nowhere else.

        Args:
            tenant: the name of the tenant that it is for.
            scopes: what it may do: infer, train, adapters, admin.
            name: a note to tell keys apart.
            expires_in: seconds; without it the key never expires.
        """
        return await self._connection.send(calls.create_key(tenant, scopes, name, expires_in))

    async def revoke(self, tenant: str, key_id: str) -> ApiKey:
        """End a key for good; a key that was revoked stays so."""
        return await self._connection.send(calls.revoke_key(tenant, key_id))

    def list(self, tenant: str) -> AsyncPages[ApiKey]:
        """A tenant's keys, oldest first, revoked ones too."""
        return AsyncPages(lambda _: self._connection.send(calls.list_keys(tenant)))


class AsyncAdmin:
    """What the operator may do: `client.admin.tenants` and `client.admin.keys`."""

    def __init__(self, connection: AsyncConnection) -> None:
        self.tenants = AsyncTenants(connection)
        self.keys = AsyncKeys(connection)
