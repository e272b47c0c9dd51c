"""Tenants and keys on their own, and what the first start makes: the default tenant and its admin key."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass

from tenora.config import Settings
from tenora.control.registry.database import Database
from tenora.control.registry.ids import random_word
from tenora.control.storage.directory import Storage, write_file
from tenora.control.tenancy.keys import Keys, hash_secret, prefix_of
from tenora.control.tenancy.rows import key_with_tenant, keys_of
from tenora.control.tenancy.tenants import DEFAULT_TENANT, Tenants
from tenora.errors import ConfigurationError

GENERATED = "bootstrap"
CONFIGURED = "TENORA_API_KEY"
SHORTEST_CONFIGURED = 16


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The default tenant's admin key.

    Attributes:
        secret: the key, if this start made it (to be printed once), else None.
        credentials: path of the file that holds a generated key, mode 0600; absent where `TENORA_API_KEY` set it.
    """

    secret: str | None
    credentials: str


def check_configured(secret: str | None) -> None:
    """Raise ConfigurationError if this cannot be the value of `TENORA_API_KEY`. Needs no database."""
    if secret is not None and (len(secret) < SHORTEST_CONFIGURED or secret != secret.strip()):
        raise ConfigurationError(
            f"TENORA_API_KEY must have at least {SHORTEST_CONFIGURED} characters and no spaces around it; "
            "`openssl rand -hex 32` makes a good one."
        )


class Registry:
    """The database with its tenants and keys: all that `tenora tenants` and `tenora keys` need, without an engine.

    `registry = await Registry.open(settings)` … `await registry.close()`.
    """

    def __init__(self, settings: Settings, storage: Storage, database: Database) -> None:
        self.settings = settings
        self.storage = storage
        self.database = database
        self.tenants = Tenants(database)
        self.keys = Keys(database, cache_seconds=settings.key_cache_seconds)

    @classmethod
    async def open(cls, settings: Settings) -> Registry:
        """Open (and create or migrate) the registry of this state directory."""
        storage = await asyncio.to_thread(Storage, settings.root)
        return cls(settings, storage, await Database.open(settings.database))

    async def close(self) -> None:
        """Close the database."""
        await self.database.close()

    async def bootstrap(self) -> Bootstrap:
        """Make sure that the default tenant has an admin key.

        With `TENORA_API_KEY` that key is it, and an earlier value of the variable stops working. Otherwise the first
        start makes one and keeps it in `$TENORA_HOME/credentials`.
        """
        credentials = self.settings.root / "credentials"
        tenant = await self.tenants.ensure(DEFAULT_TENANT)
        if self.settings.api_key is not None:
            await self._configure(tenant.id, self.settings.api_key)
            return Bootstrap(None, str(credentials))
        async with self.database.read() as session:
            known = await keys_of(session, tenant.id, GENERATED)
        if known:
            return Bootstrap(None, str(credentials))
        secret = f"tk-{random_word(12)}-{secrets.token_urlsafe(32)}"
        # The file first: a crash in between leaves a key that does not work, and the next start makes another. The
        # other way round would leave a working key that nobody knows.
        await asyncio.to_thread(write_file, self.storage, credentials, f"{secret}\n".encode())
        async with self.database.write() as session:
            await self.keys.insert(session, tenant.id, secret, ["admin"], name=GENERATED)
        return Bootstrap(secret, str(credentials))

    async def _configure(self, tenant_id: str, secret: str) -> None:
        check_configured(secret)
        async with self.database.write() as session:
            known = await key_with_tenant(session, prefix_of(secret))
            if known is not None:
                row, _ = known
                if row.revoked_at is None and row.tenant_id == tenant_id and row.hash == hash_secret(secret):
                    return
                raise ConfigurationError(
                    "TENORA_API_KEY is a key that was revoked or belongs to another tenant; choose a new one."
                )
            await self.keys.revoke_named(session, tenant_id, CONFIGURED)
            await self.keys.insert(session, tenant_id, secret, ["admin"], name=CONFIGURED)
