"""Opening, migrating, tenants, keys and the bootstrap key."""

from __future__ import annotations

import sqlite3
import stat
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.orm import Session

from tenora.config import Settings
from tenora.control.control import Control, Registry
from tenora.control.jobs.records import JobRequest
from tenora.control.registry.database import Database, RegistryBusyError, RegistryDamagedError, RowExistsError
from tenora.control.registry.dialects import dialect
from tenora.control.registry.dialects.by_url import dialect_of
from tenora.control.registry.tables import Base, TenantRow
from tenora.control.tenancy import keys
from tenora.engine.client.client import AsyncEngine
from tenora.errors import (
    AuthenticationError,
    ConfigurationError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    StorageFullError,
    UnavailableError,
)
from tests.control.conftest import OpenControl, tenant, without_engine
from tests.support.scripted_jobs import JobScript


@pytest.fixture
async def registry(home: Path, registry_url: str | None) -> AsyncIterator[Registry]:
    opened = await Registry.open(Settings(home=home, database_url=registry_url))
    yield opened
    await opened.close()


async def test_the_migrations_build_the_schema(registry: Registry) -> None:
    def differences(session: Session) -> list[Any]:
        return list(compare_metadata(MigrationContext.configure(session.connection()), Base.metadata))

    async with registry.database.read() as session:
        assert await session.run_sync(differences) == []


def test_every_table_is_scoped_to_a_tenant() -> None:
    tables = {name for name, table in Base.metadata.tables.items() if "tenant_id" not in table.columns}
    assert tables == {"tenants", "processes"}


@pytest.mark.sqlite
async def test_sqlite_is_durable_and_checks_references(registry: Registry) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
    async with registry.database.read() as session:
        for pragma, value in wanted.items():
            assert (await session.scalar(sqlalchemy.text(f"PRAGMA {pragma}"))) == value


async def test_a_transaction_is_whole_or_nothing(registry: Registry) -> None:
    async def half() -> None:
        async with registry.database.write() as session:
            session.add(TenantRow(id="t", name="half", created_at=1))
            await session.flush()
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        await half()
    assert await registry.tenants.list() == []


@pytest.mark.sqlite
async def test_a_newer_database_is_refused(registry: Registry, home: Path) -> None:
    with sqlite3.connect(home / "tenora.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    with pytest.raises(ConfigurationError, match="another version of Tenora"):
        await Database.open(Settings(home=home).database)


async def test_a_database_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "tenora.db").write_bytes(b"this is a text file and no database" * 100)
    for url in (f"sqlite+aiosqlite:///{tmp_path / 'tenora.db'}", f"sqlite+aiosqlite:///{tmp_path / 'no' / 'x.db'}"):
        with pytest.raises(ConfigurationError, match="cannot be opened"):
            await Database.open(url)
    for url in ("nonsense", "sqlite+aiosqlite:///:memory:", "mysql+nothing://x/y"):
        with pytest.raises(ConfigurationError):
            await Database.open(url)


@pytest.mark.sqlite
async def test_a_locked_database_is_unavailable(
    registry: Registry, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dialect, "BUSY_MILLISECONDS", 50)
    other = await Database.open(registry.settings.database)
    blocker = sqlite3.connect(home / "tenora.db", isolation_level=None)
    blocker.execute("BEGIN IMMEDIATE")
    try:
        with pytest.raises(RegistryBusyError, match="busy"):
            async with other.write() as session:
                session.add(TenantRow(id="t", name="late", created_at=1))
    finally:
        blocker.close()
        await other.close()


def sqlite_error(code: int, text: str = "full locked connect") -> sqlalchemy.exc.OperationalError:
    """As the driver raises it; the text says what the code does not, which must not matter."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return sqlalchemy.exc.OperationalError("q", None, error)


def postgres_error(state: str) -> sqlalchemy.exc.DBAPIError:
    error = Exception("full locked connect")
    error.sqlstate = state  # type: ignore[attr-defined]
    return sqlalchemy.exc.DBAPIError("q", None, error)


@pytest.mark.sqlite
@pytest.mark.parametrize("transaction", ["read", "write"])
@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (sqlite_error(sqlite3.SQLITE_FULL), StorageFullError),
        (sqlite_error(sqlite3.SQLITE_IOERR_SHMSIZE), StorageFullError),
        (sqlite_error(sqlite3.SQLITE_BUSY), RegistryBusyError),
        (sqlite_error(sqlite3.SQLITE_BUSY_SNAPSHOT), RegistryBusyError),
        (sqlite_error(sqlite3.SQLITE_CANTOPEN), RegistryBusyError),
        (sqlite_error(sqlite3.SQLITE_CORRUPT), RegistryDamagedError),
        (sqlite_error(sqlite3.SQLITE_CORRUPT_INDEX), RegistryDamagedError),
        (sqlite_error(sqlite3.SQLITE_IOERR_READ), RegistryDamagedError),
        (sqlite_error(sqlite3.SQLITE_CONSTRAINT_UNIQUE), RowExistsError),
        (sqlite_error(sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY), RowExistsError),
        (sqlite_error(sqlite3.SQLITE_CONSTRAINT_CHECK), sqlalchemy.exc.OperationalError),
        (sqlite_error(sqlite3.SQLITE_ERROR), sqlalchemy.exc.OperationalError),
        (sqlalchemy.exc.TimeoutError("pool"), RegistryBusyError),
        (ConnectionRefusedError(), RegistryBusyError),
        (sqlalchemy.exc.IntegrityError("q", None, Exception("connect")), sqlalchemy.exc.IntegrityError),
    ],
)
async def test_failures_of_the_driver(
    registry: Registry, transaction: str, failure: Exception, told: type[Exception]
) -> None:
    with pytest.raises(told) as caught:
        async with getattr(registry.database, transaction)():
            raise failure
    assert type(caught.value) is told


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (postgres_error("53100"), StorageFullError),
        (postgres_error("53300"), RegistryBusyError),
        (postgres_error("57P01"), RegistryBusyError),
        (postgres_error("55P03"), RegistryBusyError),
        (postgres_error("XX001"), RegistryDamagedError),
        (postgres_error("23505"), RowExistsError),
        (postgres_error("42P01"), type(None)),
        (postgres_error(""), type(None)),
        (sqlalchemy.exc.InterfaceError("q", None, Exception("?"), connection_invalidated=True), RegistryBusyError),
    ],
)
def test_failures_of_postgres_are_told_by_their_state(failure: sqlalchemy.exc.DBAPIError, told: type) -> None:
    assert type(dialect_of("postgresql://u:p@h/d").meaning(failure)) is told


@pytest.mark.sqlite
async def test_jobs_are_counted_from_the_index_alone(registry: Registry) -> None:
    """Every scrape asks: it must not read the rows, whose JSON may be large."""
    async with registry.database.read() as session:
        query = "EXPLAIN QUERY PLAN SELECT status, count(*) FROM jobs GROUP BY status"
        plan = [str(row) for row in await session.execute(sqlalchemy.text(query))]
    assert "COVERING INDEX ix_jobs_status" in " ".join(plan)


async def test_tenants(registry: Registry) -> None:
    acme = await registry.tenants.create("acme")
    assert await registry.tenants.get("acme") == acme
    assert [one.name for one in await registry.tenants.list()] == ["acme"]
    with pytest.raises(ConflictError):
        await registry.tenants.create("acme")
    with pytest.raises(NotFoundError):
        await registry.tenants.get("nobody")
    for name in ("", "Acme", "a/b", "-a", "a" * 64, "a\n", "..", "ä"):
        with pytest.raises(InvalidRequestError):
            await registry.tenants.create(name)


def bytes_at_rest(home: Path) -> bytes:
    return b"".join(path.read_bytes() for path in home.glob("tenora.db*"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.sqlite
async def test_the_state_is_private(control: Control, home: Path) -> None:
    readable = 0o077
    await tenant(control, "acme")
    for name in ("tenora.db", "tenora.db-wal", "staging", "tenants", "adapters", "credentials", "serve.lock"):
        assert mode(home / name) & readable == 0, name


@pytest.mark.sqlite
async def test_keys_are_shown_once_and_hashed_at_rest(registry: Registry, home: Path) -> None:
    acme = await registry.tenants.create("acme")
    record, secret = await registry.keys.create(acme.id, ["infer", "train"], name="laptop")
    principal = await registry.keys.authenticate(secret)
    assert (principal.tenant_id, principal.tenant, principal.key_id) == (acme.id, "acme", record.id)
    assert principal.scopes == {"infer", "train"}
    assert len(secret.rpartition("-")[2]) <= 43
    assert len(secret) == len(f"tk-{record.prefix}-") + 43  # 32 random bytes
    assert [one.id for one in await registry.keys.list(acme.id)] == [record.id]
    stored = bytes_at_rest(home)
    assert record.prefix.encode() in stored
    assert secret[len(f"tk-{record.prefix}-") :].encode() not in stored


async def test_wrong_keys_all_get_the_same_answer(registry: Registry) -> None:
    acme = await registry.tenants.create("acme")
    record, secret = await registry.keys.create(acme.id, ["infer"])
    other = secret[:-1] + ("a" if secret[-1] != "a" else "b")
    messages = set()
    for wrong in (other, "", "x", "tk-000000000000-" + "a" * 43, secret + "a", secret.upper(), "é" * 20, "a" * 10_000):
        with pytest.raises(AuthenticationError) as caught:
            await registry.keys.authenticate(wrong)
        messages.add((caught.value.message, caught.value.code, caught.value.param))
    assert len(messages) == 1
    await registry.keys.revoke(acme.id, record.id)
    with pytest.raises(AuthenticationError) as caught:
        await registry.keys.authenticate(secret)
    assert (caught.value.message, caught.value.code, caught.value.param) in messages


async def test_bad_keys_are_not_made(registry: Registry) -> None:
    acme = await registry.tenants.create("acme")
    for scopes in ([], ["everything"], ["infer", "Infer"]):
        with pytest.raises(InvalidRequestError, match="scopes"):
            await registry.keys.create(acme.id, scopes)
    for seconds in (0, -1, 100 * 365 * 24 * 3600 + 1, 10**30):
        with pytest.raises(InvalidRequestError, match="expires_in"):
            await registry.keys.create(acme.id, ["infer"], expires_in=seconds)
    with pytest.raises(NotFoundError):
        await registry.keys.create("tenant-none", ["infer"])
    assert await registry.keys.list(acme.id) == []


async def test_expiry(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    acme = await registry.tenants.create("acme")
    _, secret = await registry.keys.create(acme.id, ["infer"], expires_in=3600)
    await registry.keys.authenticate(secret)
    later = time.time() + 3601
    monkeypatch.setattr("tenora.control.tenancy.keys.time.time", lambda: later)
    with pytest.raises(AuthenticationError):  # though it was remembered
        await registry.keys.authenticate(secret)


async def test_revocation_here_is_at_once_and_elsewhere_within_the_cache_time(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(keys, "time", SimpleNamespace(monotonic=lambda: now, time=time.time))
    acme = await registry.tenants.create("acme")
    record, secret = await registry.keys.create(acme.id, ["infer"])
    other = await Registry.open(registry.settings)
    try:
        await registry.keys.authenticate(secret)
        await other.keys.authenticate(secret)
        await registry.keys.revoke(acme.id, record.id)
        with pytest.raises(AuthenticationError):
            await registry.keys.authenticate(secret)
        await other.keys.authenticate(secret)  # remembered
        now = registry.settings.key_cache_seconds
        with pytest.raises(AuthenticationError):
            await other.keys.authenticate(secret)
    finally:
        await other.close()


async def test_a_key_is_revoked_by_its_tenant_only(registry: Registry) -> None:
    acme, umbrella = await registry.tenants.create("acme"), await registry.tenants.create("umbrella")
    record, secret = await registry.keys.create(acme.id, ["infer"])
    with pytest.raises(NotFoundError) as foreign:
        await registry.keys.revoke(umbrella.id, record.id)
    with pytest.raises(NotFoundError) as missing:
        await registry.keys.revoke(umbrella.id, "key-none")
    assert foreign.value.message.replace(record.id, "key-none") == missing.value.message
    await registry.keys.authenticate(secret)
    first = await registry.keys.revoke(acme.id, record.id)
    assert (await registry.keys.revoke(acme.id, record.id)).revoked_at == first.revoked_at


async def test_the_first_start_makes_a_key_and_keeps_it_private(open_control: OpenControl, home: Path) -> None:
    control = await open_control()
    secret = control.bootstrap.secret
    assert secret is not None
    credentials = home / "credentials"
    assert credentials.read_text() == secret + "\n"
    assert (mode(credentials), mode(home)) == (0o600, 0o700)
    principal = await control.keys.authenticate(secret)
    assert (principal.tenant, principal.scopes) == ("default", frozenset({"admin"}))
    await control.close()
    again = await open_control()
    assert again.bootstrap.secret is None
    await again.keys.authenticate(secret)
    assert credentials.read_text() == secret + "\n"


async def test_the_operator_sets_and_changes_the_key(open_control: OpenControl, home: Path) -> None:
    old, new = "an-operator's-old-key", "an-operator's-new-key"
    control = await open_control(api_key=old)
    assert control.bootstrap.secret is None
    assert not (home / "credentials").exists()
    await control.keys.authenticate(old)
    await control.close()
    control = await open_control(api_key=old)
    await control.keys.authenticate(old)
    await control.close()
    control = await open_control(api_key=new)
    assert (await control.keys.authenticate(new)).tenant == "default"
    with pytest.raises(AuthenticationError):
        await control.keys.authenticate(old)
    await control.close()
    with pytest.raises(ConfigurationError, match="revoked"):
        await open_control(api_key=old)
    for weak in ("short", " " + new):
        with pytest.raises(ConfigurationError, match="16 characters"):
            await open_control(api_key=weak)


async def test_one_server_per_state_directory(open_control: OpenControl, control: Control) -> None:
    with pytest.raises(ConfigurationError, match="Another Tenora serves"):
        await open_control()
    await control.close()
    await open_control()


async def test_readiness_and_draining(control: Control, engine: AsyncEngine, script: JobScript) -> None:
    acme = await tenant(control, "acme")
    assert control.ready()
    await without_engine(engine, script)
    assert not control.ready()
    script.come_back()
    await engine.wait_alive()
    control.begin_drain()
    assert not control.ready()
    with pytest.raises(UnavailableError, match="shutting down"):
        await control.jobs.create(acme, JobRequest(model="tiny", training_file="file-x"))
