"""The registry's database: opening, migrating, and the two kinds of transaction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import URL, Connection, event, make_url
from sqlalchemy.exc import ArgumentError, DatabaseError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tenora.control.registry.driver_errors import RegistryBusyError, RegistryDamagedError, told
from tenora.control.registry.reserve import Reserve
from tenora.errors import ConfigurationError, TenoraError

__all__ = ["Database", "RegistryBusyError", "RegistryDamagedError"]

_log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_MILLISECONDS = 10_000
RECHECK_SECONDS = 10.0  # between two looks at a registry that seemed damaged


class Database:
    """Read and write transactions on the registry; one per process.

    SQLite allows one writer: writes of this process queue on a lock here instead of polling the file, and begin
    IMMEDIATE, because a read transaction that turns into a write fails at once when another write came between.
    """

    def __init__(self, engine: AsyncEngine, reserve: Reserve | None = None) -> None:
        self._trouble = asyncio.Event()
        self._reserve = reserve
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
        reserve: Reserve | None = None
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
            reserve = Reserve(Path(f"{parsed.database}-reserve"))
            event.listen(engine.sync_engine, "connect", _configure_sqlite)
            event.listen(engine.sync_engine, "begin", _begin_sqlite)
        database = cls(engine, reserve)
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
            another = getattr(error.orig, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB  # a file of another kind
            if isinstance(told(error), RegistryDamagedError) and not another:
                raise _damaged(parsed, str(error.orig)) from error
            raise ConfigurationError(
                f"The database {parsed.render_as_string()} cannot be opened: {error.orig}."
            ) from error
        return database

    @property
    def damaged(self) -> bool:
        """Whether a page could not be read as it was written, or the disk failed, and no look since found all whole."""
        return self._trouble.is_set()

    async def watch(self) -> None:
        """Look again at a registry that seemed damaged until it is whole: an error of the disk may have passed."""
        while True:
            await self._trouble.wait()
            await asyncio.sleep(RECHECK_SECONDS)
            try:
                await self.check()
            except TenoraError:
                continue
            self._trouble.clear()
            _log.warning("the registry is whole; the error of its disk has passed")

    async def check(self) -> None:
        """Read every page of SQLite's file once, as a server does before it relies on them.

        Raises:
            ConfigurationError: a page is damaged.
        """
        if self._reserve is None:
            return  # Postgres looks after its own
        try:
            async with self._read.connect() as connection:
                found = (await connection.exec_driver_sql("PRAGMA quick_check(1)")).scalar()
        except DatabaseError as error:
            found = str(error.orig)
        if found != "ok":
            raise _damaged(self._read.url, " ".join(str(found).split()))

    @contextlib.asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncSession]:
        """A session that sees one snapshot and writes nothing.

        Raises:
            RegistryBusyError: the registry is held by another process, or cannot be reached.
        """
        with self._failures():
            async with AsyncSession(self._read, expire_on_commit=False) as session:
                yield session

    @contextlib.asynccontextmanager
    async def write(self, *, frees: bool = False) -> AsyncIterator[AsyncSession]:
        """A transaction that commits at the end of the block, or rolls back if the block raises.

        Args:
            frees: the block deletes something, so that it may use the reserve if the disk is full.

        Raises:
            RegistryBusyError: the registry is held by another process, or cannot be reached.
            StorageFullError: its disk is full.
            RegistryDamagedError: its disk has failed.
        """
        async with self._writing, self._lent(frees):
            with self._failures():
                async with AsyncSession(self._write, expire_on_commit=False) as session, session.begin():
                    yield session

    @contextlib.asynccontextmanager
    async def _lent(self, frees: bool) -> AsyncIterator[None]:
        """Lend the reserve to the block, and take it again as soon as there is room."""
        if self._reserve is None or (self._reserve.whole and not frees):
            yield
            return
        if frees:
            await asyncio.to_thread(self._reserve.lend)
        try:
            yield
        finally:
            if not self._reserve.whole:
                await asyncio.to_thread(self._reserve.keep)

    async def restock(self) -> None:
        """Take the reserve again, after something was deleted whose space may be had now."""
        if self._reserve is not None and not self._reserve.whole:
            async with self._writing:  # or it would be taken from a deletion that it was lent to
                await asyncio.to_thread(self._reserve.keep)

    async def close(self) -> None:
        """Close every connection."""
        await self._read.dispose()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Errors of the driver that are nobody's defect become ours."""
        try:
            yield
        except (PoolTimeoutError, ConnectionError) as error:
            raise RegistryBusyError from error
        except DBAPIError as error:
            known = told(error)
            if known is None:
                raise
            if isinstance(known, RegistryDamagedError):
                self._trouble.set()
                _log.critical("the registry is damaged", extra={"reason": str(error.orig)})
            raise known from error


def _damaged(url: URL, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"The database {url.render_as_string()} is damaged ({reason}). Restore it from a backup; without one, "
        "`sqlite3 tenora.db .recover` saves what can be read."
    )


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
