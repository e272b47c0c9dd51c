# Made of async_admin.py by scripts/unasync.py (`make client`): change that one.
"""Tenants and their keys, of the synchronous client: for the operator, a key of the default tenant with `admin`."""

from __future__ import annotations

from collections.abc import Sequence

from tenora_client import calls
from tenora_client.connection import Connection
from tenora_client.models import ApiKey, Deleted, NewApiKey, Tenant
from tenora_client.paging import Pages


class Tenants:
    """Tenants."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(self, name: str) -> Tenant:
        """Add a tenant, which has no keys yet."""
        return self._connection.send(calls.create_tenant(name))

    def get(self, name: str) -> Tenant:
        """One tenant."""
        return self._connection.send(calls.get_tenant(name))

    def update(self, name: str, *, weight: float) -> Tenant:
        """Give a tenant another share of the workers beside others, 0.01 to 100; usual is 1."""
        return self._connection.send(calls.update_tenant(name, weight))

    def delete(self, name: str) -> Deleted:
        """Delete a tenant with its keys, jobs, files and adapters; requests that were accepted finish."""
        return self._connection.send(calls.delete_tenant(name))

    def list(self) -> Pages[Tenant]:
        """All tenants, by name."""
        return Pages(lambda _: self._connection.send(calls.list_tenants()))


class Keys:
    """Keys of tenants."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def create(
        self, tenant: str, scopes: Sequence[str], *, name: str | None = None, expires_in: int | None = None
    ) -> NewApiKey:
        """Make a key; its secret is in this answer and nowhere else.

        Args:
            tenant: the name of the tenant that it is for.
            scopes: what it may do: infer, train, adapters, admin.
            name: a note to tell keys apart.
            expires_in: seconds; without it the key never expires.
        """
        return self._connection.send(calls.create_key(tenant, scopes, name, expires_in))

    def revoke(self, tenant: str, key_id: str) -> ApiKey:
        """End a key for good; a key that was revoked stays so."""
        return self._connection.send(calls.revoke_key(tenant, key_id))

    def list(self, tenant: str) -> Pages[ApiKey]:
        """A tenant's keys, oldest first, revoked ones too."""
        return Pages(lambda _: self._connection.send(calls.list_keys(tenant)))


class Admin:
    """What the operator may do: `client.admin.tenants` and `client.admin.keys`."""

    def __init__(self, connection: Connection) -> None:
        self.tenants = Tenants(connection)
        self.keys = Keys(connection)
