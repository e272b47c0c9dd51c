"""SQLite in WAL mode, a file of this machine: the registry of a service that runs on one box."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, event
from sqlalchemy.exc import DatabaseError, DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.ext.compiler import compiles

from tenora.control.registry.dialects import dialect
from tenora.control.registry.dialects.dialect import unix_time
from tenora.control.registry.driver_errors import (
    RegistryBusyError,
    RegistryDamagedError,
    RowExistsError,
    registry_full,
    registry_orphan,
)
from tenora.control.registry.reserve import Reserve
from tenora.errors import ConfigurationError, TenoraError

_TWICE = {sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY}
_PRIMARY = 0xFF  # the low byte of an extended code is the code that it refines
_FULL = {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE}  # the latter: no room for the index of the log
_BUSY = {
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_IOERR_NOMEM,
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_PROTOCOL,
}
_DAMAGED = {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY}


@compiles(unix_time, "sqlite")
def _unix_time(*_: Any, **__: Any) -> str:
    return "CAST(strftime('%s', 'now') AS INTEGER)"


class _Connection(sqlite3.Connection):
    """Ends its transaction when it is closed.

    A task that is cancelled within a statement has its connection closed, but SQLite keeps what is closed, and the lock
    of its transaction, for as long as a cursor of it lives: in the traceback of the cancellation, until that is freed.
    """

    def close(self) -> None:
        with contextlib.suppress(sqlite3.Error):  # closed before, or its disk has failed
            self.rollback()
        super().close()


class SQLite:
    """See `dialect.Dialect`. A write transaction begins IMMEDIATE, because a read transaction that turns into a write
    fails at once when another write came between."""

    one_writer = True

    def __init__(self, url: URL) -> None:
        """ConfigurationError if the URL names no file."""
        if not url.database or url.database == ":memory:":
            raise ConfigurationError(
                "The registry must be a file; set TENORA_DATABASE_URL to sqlite+aiosqlite:///path."
            )
        self.shown = url.render_as_string()
        self._url = url.set(drivername="sqlite+aiosqlite")
        self._file = Path(url.database)
        self._reserve = Reserve(f"{url.database}-reserve")

    async def connect(self) -> tuple[AsyncEngine, AsyncEngine]:
        """See `Dialect`."""
        # SQLite gives its -wal and -shm files the same permissions.
        try:
            await asyncio.to_thread(self._file.touch, mode=0o600)
        except OSError as error:
            raise ConfigurationError(f"The database {self._file} cannot be opened: {error.strerror}.") from error
        engine = create_async_engine(self._url, connect_args={"factory": _Connection})
        event.listen(engine.sync_engine, "connect", _configure)
        event.listen(engine.sync_engine, "begin", _begin)
        return engine, engine.execution_options(tenora_write=True)

    async def begin_alone(self, connection: AsyncConnection) -> None:
        """See `Dialect`; BEGIN IMMEDIATE has done it."""

    async def begin_migration(self, connection: AsyncConnection) -> None:
        """See `Dialect`; BEGIN IMMEDIATE has done it."""

    def meaning(self, error: DBAPIError) -> TenoraError | None:
        """See `Dialect`. https://www.sqlite.org/rescode.html."""
        code = getattr(error.orig, "sqlite_errorcode", None)
        kinds = set() if code is None else {code, code & _PRIMARY}
        if kinds & _FULL:
            return registry_full()
        if kinds & _BUSY:
            return RegistryBusyError()
        if code == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
            return registry_orphan()
        if code in _TWICE:
            return RowExistsError()
        return RegistryDamagedError(str(getattr(error.orig, "sqlite_errorname", code))) if kinds & _DAMAGED else None

    def unusable(self, error: DBAPIError | OSError) -> TenoraError:
        """See `Dialect`."""
        origin = error.orig if isinstance(error, DBAPIError) else error
        of_another_kind = getattr(origin, "sqlite_errorcode", None) == sqlite3.SQLITE_NOTADB
        damaged = isinstance(error, DBAPIError) and isinstance(self.meaning(error), RegistryDamagedError)
        if damaged and not of_another_kind:
            return self._damaged(str(origin))
        return ConfigurationError(f"The database {self.shown} cannot be opened: {origin}.")

    async def check(self, engine: AsyncEngine) -> None:
        """See `Dialect`: every page of the file is read once."""
        try:
            async with engine.connect() as connection:
                found = (await connection.exec_driver_sql("PRAGMA quick_check(1)")).scalar()
        except DatabaseError as error:
            found = str(error.orig)
        if found != "ok":
            raise self._damaged(" ".join(str(found).split()))

    @contextlib.asynccontextmanager
    async def room(self, *, frees: bool) -> AsyncIterator[None]:
        """See `Dialect`; lends the reserve to the block, and takes it again as soon as there is room."""
        if self._reserve.whole and not frees:
            yield
            return
        if frees:
            await asyncio.to_thread(self._reserve.lend)
        try:
            yield
        finally:
            await self.restock()

    async def restock(self) -> None:
        """See `Dialect`."""
        if not self._reserve.whole:
            await asyncio.to_thread(self._reserve.keep)

    def _damaged(self, reason: str) -> ConfigurationError:
        return ConfigurationError(
            f"The database {self.shown} is damaged ({reason}). Restore it from a backup; without one, "
            "`sqlite3 tenora.db .recover` saves what can be read."
        )


def _configure(connection: Any, _record: object) -> None:
    # The driver must not open transactions by itself: _begin decides which kind.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    # FULL, not NORMAL: in WAL mode NORMAL may lose the last commits on a power cut, and an upload or a publish that was
    # answered must stay. The registry writes a few rows a second at most, so the fsync per commit is not felt.
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.execute(f"PRAGMA busy_timeout={dialect.BUSY_MILLISECONDS}")
    cursor.close()


def _begin(connection: Connection) -> None:
    write = connection.get_execution_options().get("tenora_write", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")
