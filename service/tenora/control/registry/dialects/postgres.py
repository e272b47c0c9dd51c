"""Postgres: the registry of a service that runs as several processes or on several machines."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from sqlalchemy import URL, text
from sqlalchemy.exc import ArgumentError, DBAPIError
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
from tenora.errors import ConfigurationError, TenoraError

# https://www.postgresql.org/docs/current/errcodes-appendix.html
_FULL = ("53100",)
_BUSY = ("08", "53", "57", "40001", "40P01", "55P03")
_ORPHAN = "23503"
_TWICE = "23505"
_DAMAGED = ("XX001", "XX002", "58030")
# Keys of advisory locks, which a database's sessions share: "tenora" in ASCII, and which lock it is.
_TENORA = 0x74656E6F7261
_WRITERS, _MIGRATION = _TENORA << 8 | 1, _TENORA << 8 | 2
_PARAMETERS = {"ssl", "sslmode", "host", "port"}


@compiles(unix_time, "postgresql")
def _unix_time(*_: Any, **__: Any) -> str:
    return "CAST(floor(extract(epoch FROM clock_timestamp())) AS BIGINT)"


class Postgres:
    """See `dialect.Dialect`.

    A read is REPEATABLE READ: one snapshot, as in SQLite. A write that reads before it writes begins alone, so what it
    has read stays true until it commits; claims, heartbeats and the lines of a log need no more than the locks of the
    rows that they write.
    """

    one_writer = False

    def __init__(self, url: URL) -> None:
        """ConfigurationError if the URL asks for what is not known here."""
        if unknown := sorted(set(url.query) - _PARAMETERS):
            raise ConfigurationError(
                f"TENORA_DATABASE_URL has the parameter {unknown[0]!r}; it may have {', '.join(sorted(_PARAMETERS))}."
            )
        if "sslmode" in url.query:  # as libpq calls it
            url = url.difference_update_query(["sslmode"]).update_query_dict({"ssl": url.query["sslmode"]})
        self._url = url.set(drivername="postgresql+asyncpg")
        self.shown = self._url.set(drivername="postgresql").render_as_string(hide_password=True)

    async def connect(self) -> tuple[AsyncEngine, AsyncEngine]:
        """See `Dialect`."""
        settings = {"application_name": "tenora", "lock_timeout": str(dialect.BUSY_MILLISECONDS)}
        try:
            engine = create_async_engine(
                self._url, pool_pre_ping=True, connect_args={"server_settings": settings}, hide_parameters=True
            )
        except ImportError as error:
            raise ConfigurationError("A registry in Postgres needs asyncpg: pip install 'tenora[postgres]'.") from error
        except (ArgumentError, ValueError) as error:
            raise ConfigurationError(f"The database {self.shown} cannot be used: {error}.") from error
        return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True), engine

    async def begin_alone(self, connection: AsyncConnection) -> None:
        """See `Dialect`; the lock goes with the transaction."""
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _WRITERS})

    async def begin_migration(self, connection: AsyncConnection) -> None:
        """See `Dialect`; the lock goes with the transaction."""
        await connection.execute(text("SET LOCAL lock_timeout = 0"))
        await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _MIGRATION})

    def meaning(self, error: DBAPIError) -> TenoraError | None:
        """See `Dialect`."""
        state = str(getattr(error.orig, "sqlstate", None) or "")
        if state.startswith(_FULL):
            return registry_full()
        if error.connection_invalidated or state.startswith(_BUSY):
            return RegistryBusyError()
        if state == _ORPHAN:
            return registry_orphan()
        if state == _TWICE:
            return RowExistsError()
        return RegistryDamagedError(f"SQLSTATE {state}") if state.startswith(_DAMAGED) else None

    def unusable(self, error: DBAPIError | OSError) -> TenoraError:
        """See `Dialect`."""
        origin = error.orig if isinstance(error, DBAPIError) else error
        reason = str(origin).rpartition(">: ")[2]  # SQLAlchemy puts the class in front
        if self._url.password:
            reason = reason.replace(str(self._url.password), "***")
        return ConfigurationError(f"The database {self.shown} cannot be opened: {reason}.")

    async def check(self, engine: AsyncEngine) -> None:
        """See `Dialect`; Postgres looks after its own pages."""

    @contextlib.asynccontextmanager
    async def room(self, *, frees: bool) -> AsyncIterator[None]:  # noqa: ARG002 (as in `Dialect`)
        """See `Dialect`; its disk is not ours to keep space on."""
        yield

    async def restock(self) -> None:
        """See `Dialect`."""
