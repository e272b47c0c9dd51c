"""The registry's database: opening, migrating, and the two kinds of transaction."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection, event, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tenora.errors import ConfigurationError, StorageFullError, UnavailableError

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_MILLISECONDS = 10_000


class RegistryBusyError(UnavailableError):
    """Another process holds the registry, or it cannot be reached now; nothing was written. Trying again may help."""

    code = "registry_busy"

    def __init__(self) -> None:
        super().__init__("The registry is busy; try again in a moment.")


class Database:
    """Read and write transactions on the registry; one per process.

    SQLite allows one writer: writes of this process queue on a lock here instead of polling the file, and begin
    IMMEDIATE, because a read transaction that turns into a write fails at once when another write came between.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._read = engine
        self._write = engine.execution_options(tenora_write=True)
        self._writing = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect and migrate to the newest schema. ConfigurationError if the database cannot be used."""
        try:
            parsed = make_url(url)
            engine = create_async_engine(url)
        except (ArgumentError, ImportError) as error:
            raise ConfigurationError(
                f"TENORA_DATABASE_URL cannot be used ({error}); leave it out for SQLite."
            ) from error
        if parsed.get_backend_name() == "sqlite":
            if not parsed.database or parsed.database == ":memory:":
                raise ConfigurationError(
                    "The registry must be a file; set TENORA_DATABASE_URL to sqlite+aiosqlite:///path."
                )
            # SQLite gives its -wal and -shm files the same permissions.
            try:
                await asyncio.to_thread(Path(parsed.database).touch, mode=0o600)
            except OSError as error:
                raise ConfigurationError(
                    f"The database {parsed.database} cannot be opened: {error.strerror}."
                ) from error
            event.listen(engine.sync_engine, "connect", _configure_sqlite)
            event.listen(engine.sync_engine, "begin", _begin_sqlite)
        database = cls(engine)
        try:
            async with database._write.begin() as connection:
                await connection.run_sync(_migrate)
        except CommandError as error:
            await engine.dispose()
            raise ConfigurationError(
                f"The database was written by another version of Tenora ({error}); start the version that wrote it."
            ) from error
        except DatabaseError as error:
            await engine.dispose()
            raise ConfigurationError(
                f"The database {parsed.render_as_string()} cannot be opened: {error.orig}."
            ) from error
        return database

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session that sees one snapshot and writes nothing.

        Raises:
            RegistryBusyError: the registry is held by another process, or cannot be reached.
        """
        with _failures():
            async with AsyncSession(self._read, expire_on_commit=False) as session:
                yield session

    @contextlib.asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncSession]:
        """A transaction that commits at the end of the block, or rolls back if the block raises.

        Raises:
            RegistryBusyError: the registry is held by another process, or cannot be reached.
            StorageFullError: its disk is full.
        """
        async with self._writing:
            with _failures():
                async with AsyncSession(self._write, expire_on_commit=False) as session, session.begin():
                    yield session

    async def close(self) -> None:
        """Close every connection."""
        await self._read.dispose()


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """Errors of the driver that are nobody's defect become ours."""
    try:
        yield
    except (PoolTimeoutError, ConnectionError) as error:
        raise RegistryBusyError from error
    except (OperationalError, InterfaceError) as error:
        reason = str(error.orig)
        if "full" in reason:
            raise StorageFullError("The disk of the registry is full; free some space and try again.") from error
        if error.connection_invalidated or "locked" in reason or "connect" in reason:
            raise RegistryBusyError from error
        raise


def _configure_sqlite(connection: Any, _record: object) -> None:
    # The driver must not open transactions by itself: _begin_sqlite decides which kind.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL, not NORMAL: in WAL mode NORMAL may lose the last commits on a power cut, and an upload or a publish that was
    # answered must stay. The registry writes a few rows a second at most, so the fsync per commit is not felt.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={BUSY_MILLISECONDS}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    write = connection.get_execution_options().get("tenora_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
