"""API keys: 256-bit secrets of which only a prefix and a SHA-256 are kept.

A secret reads `tk-<prefix>-<secret>`: the prefix finds the row, the hash proves the rest. A fast hash is right here:
the secrets are random, so there is no dictionary to try. Operators may set the default tenant's key themselves
(`TENORA_API_KEY`); its prefix is derived from its hash.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from tenora.control.registry.database import Database, Session
from tenora.control.registry.ids import new_id, random_word, unix_now
from tenora.control.registry.tables import KeyRow, TenantRow
from tenora.control.tenancy.records import LONGEST_KEY_LIFE, SCOPES, KeyRecord, Principal
from tenora.control.tenancy.rows import find_key, key_with_tenant, keys_of, revoke_keys
from tenora.errors import AuthenticationError, InvalidRequestError, NotFoundError

_FORM = re.compile(r"tk-([0-9a-z]{12})-[A-Za-z0-9_-]{43}")
_CACHE_ENTRIES = 4096
_LONGEST_SECRET = 512


class Keys:
    """Creates, checks and revokes API keys.

    A key that was found good is remembered for `cache_seconds`, so a revocation by another process takes effect within
    that time; one by this process takes effect at once. Keys that are not found are never remembered.
    """

    def __init__(self, database: Database, *, cache_seconds: float) -> None:
        self._database = database
        self._cache_seconds = cache_seconds
        self._cache: OrderedDict[bytes, tuple[float, int | None, Principal]] = OrderedDict()

    async def authenticate(self, secret: str) -> Principal:
        """Who this secret belongs to. AuthenticationError, the same for unknown, revoked and expired."""
        if not secret or len(secret) > _LONGEST_SECRET:
            raise _refused()
        digest = hash_secret(secret)
        cached = self._cache.get(digest)
        if cached is not None and time.monotonic() < cached[0] and _alive(cached[1]):
            return cached[2]
        async with self._database.read() as session:
            found = await key_with_tenant(session, prefix_of(secret))
        # An unknown prefix takes the same path as a wrong secret.
        expected = found[0].hash if found else bytes(len(digest))
        if not hmac.compare_digest(expected, digest) or found is None:
            raise _refused()
        key, tenant = found
        if key.revoked_at is not None or not _alive(key.expires_at):
            self._cache.pop(digest, None)
            raise _refused()
        principal = Principal(tenant_id=tenant.id, tenant=tenant.name, key_id=key.id, scopes=frozenset(key.scopes))
        self._remember(digest, key.expires_at, principal)
        return principal

    async def create(
        self, tenant_id: str, scopes: Iterable[str], *, name: str | None = None, expires_in: int | None = None
    ) -> tuple[KeyRecord, str]:
        """A new key of a tenant and its secret, which is shown here and never again.

        Args:
            scopes: at least one of infer, train, adapters, admin.
            expires_in: seconds from now; None never expires.
        """
        secret = f"tk-{random_word(12)}-{secrets.token_urlsafe(32)}"
        async with self._database.write() as session:
            record = await self.insert(session, tenant_id, secret, scopes, name=name, expires_in=expires_in)
        return record, secret

    async def insert(
        self,
        session: Session,
        tenant_id: str,
        secret: str,
        scopes: Iterable[str],
        *,
        name: str | None = None,
        expires_in: int | None = None,
    ) -> KeyRecord:
        """Add a key with a given secret inside an open transaction."""
        chosen = frozenset(scopes)
        unknown = chosen - frozenset(SCOPES)
        if unknown or not chosen:
            raise InvalidRequestError(
                f"scopes must name at least one of {', '.join(SCOPES)}; got {sorted(unknown)}.", param="scopes"
            )
        if expires_in is not None and not 0 < expires_in <= LONGEST_KEY_LIFE:
            raise InvalidRequestError(
                f"expires_in must be a number of seconds from 1 to {LONGEST_KEY_LIFE}; leave it out for no expiry.",
                param="expires_in",
            )
        if name is not None and not 0 < len(name) <= 128:
            raise InvalidRequestError("The name of a key must have 1 to 128 characters.", param="name")
        if await session.get(TenantRow, tenant_id) is None:
            raise NotFoundError("There is no such tenant; `tenora tenants list` shows them.", param="tenant")
        now = unix_now()
        row = KeyRow(
            id=new_id("key"),
            tenant_id=tenant_id,
            name=name,
            prefix=prefix_of(secret),
            hash=hash_secret(secret),
            scopes=sorted(chosen),
            created_at=now,
            expires_at=None if expires_in is None else now + expires_in,
            revoked_at=None,
        )
        session.add(row)
        return key_record(row)

    async def list(self, tenant_id: str) -> Sequence[KeyRecord]:
        """The tenant's keys, oldest first, revoked ones too."""
        async with self._database.read() as session:
            return [key_record(row) for row in await keys_of(session, tenant_id)]

    async def revoke(self, tenant_id: str, key_id: str) -> KeyRecord:
        """End a key for good; repeating it changes nothing. NotFoundError if the tenant has no such key."""
        async with self._database.write(frees=True) as session:
            row = await find_key(session, tenant_id, key_id)
            if row is None:
                raise NotFoundError(f"There is no key {key_id!r}; `tenora keys list` shows them.", param="key_id")
            if row.revoked_at is None:
                row.revoked_at = unix_now()
        self.forget()
        return key_record(row)

    async def revoke_all(self, tenant_id: str) -> None:
        """End every key of a tenant for good."""
        async with self._database.write(frees=True) as session:
            await revoke_keys(session, tenant_id, unix_now())
        self.forget()

    async def revoke_named(self, session: Session, tenant_id: str, name: str) -> None:
        """Revoke every key of that name inside an open transaction."""
        await revoke_keys(session, tenant_id, unix_now(), name)
        self.forget()

    def forget(self) -> None:
        """Drop every remembered key."""
        self._cache.clear()

    def _remember(self, digest: bytes, expires_at: int | None, principal: Principal) -> None:
        if self._cache_seconds <= 0:
            return
        self._cache[digest] = (time.monotonic() + self._cache_seconds, expires_at, principal)
        self._cache.move_to_end(digest)
        while len(self._cache) > _CACHE_ENTRIES:
            self._cache.popitem(last=False)


def hash_secret(secret: str) -> bytes:
    """What is kept of a secret."""
    return hashlib.sha256(secret.encode()).digest()


def prefix_of(secret: str) -> str:
    """The part of a secret that may be shown and that finds its row."""
    match = _FORM.fullmatch(secret)
    return match[1] if match else "x" + hash_secret(secret).hex()[:11]


def key_record(row: KeyRow) -> KeyRecord:
    """The row as it is handed out."""
    return KeyRecord(
        id=row.id,
        tenant_id=row.tenant_id,
        name=row.name,
        prefix=row.prefix,
        scopes=frozenset(row.scopes),
        created_at=row.created_at,
        expires_at=row.expires_at,
        revoked_at=row.revoked_at,
    )


def _alive(expires_at: int | None) -> bool:
    return expires_at is None or time.time() < expires_at


def _refused() -> AuthenticationError:
    return AuthenticationError(
        "The API key is unknown, revoked or expired; send a valid one as `Authorization: Bearer <key>`."
    )
