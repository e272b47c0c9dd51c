"""The registry's database: opening, migrating, and the two kinds of transaction."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm.exc import StaleDataError

from tenora.control.registry.dialects.by_url import dialect_of
from tenora.control.registry.dialects.dialect import Dialect
from tenora.control.registry.driver_errors import RegistryBusyError, RegistryDamagedError, RowExistsError
from tenora.errors import ConfigurationError, TenoraError

__all__ = ["Database", "RegistryBusyError", "RegistryDamagedError", "RowExistsError", "Session"]

_log = logging.getLogger(__name__)

MIGRATIONS = Path(__file__).parent / "migrations"
RECHECK_SECONDS = 10.0  # between two looks at a registry that seemed damaged
Session = AsyncSession  # by a name that those may use who know no SQL


class Database:
    """Read and write transactions on the registry; one per process.

    Writes of this process queue on a lock here, and neither poll the database nor hold a connection while they wait.
    """

    def __init__(self, dialect: Dialect, read: AsyncEngine, write: AsyncEngine) -> None:
        self._trouble = asyncio.Event()
        self._dialect = dialect
        self._read = read
        self._write = write
        self._writing = asyncio.Lock()

    @classmethod
    async def open(cls, url: str) -> Database:
        """Connect and migrate to the newest schema; of several that open it at once, one migrates.

        Raises:
            ConfigurationError: the database cannot be used.
        """
        dialect = dialect_of(url)
        read, write = await dialect.connect()
        try:
            async with write.begin() as connection:
                await dialect.begin_migration(connection)
                await connection.run_sync(_migrate)
        except BaseException as error:
            await write.dispose()
            if isinstance(error, CommandError):
                raise ConfigurationError(
                    f"The database was written by another version of Tenora ({error}); start the version that wrote it."
                ) from error
            if isinstance(error, (DBAPIError, OSError)):
                raise dialect.unusable(error) from error
            raise
        return cls(dialect, read, write)

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
        await self._dialect.check(self._read)

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
    async def write(self, *, frees: bool = False, alone: bool = True) -> AsyncIterator[AsyncSession]:
        """A transaction that commits at the end of the block, or rolls back if the block raises.

        Args:
            frees: the block deletes something, so that it may use the reserve if the disk is full.
            alone: what the block reads stays true until it commits, for no other process writes meanwhile. Without it
                only the rows that it locks do, and it waits for nobody else.

        Raises:
            RegistryBusyError: the registry is held by another process, or cannot be reached.
            StorageFullError: its disk is full.
            RegistryDamagedError: its disk has failed.
            RowExistsError: another row has the key or name of one that the block adds.
        """
        queue = self._writing if alone or self._dialect.one_writer else contextlib.nullcontext()
        async with queue, self._dialect.room(frees=frees):
            with self._failures():
                async with AsyncSession(self._write, expire_on_commit=False) as session, session.begin():
                    if alone:
                        await self._dialect.begin_alone(await session.connection())
                    yield session

    async def restock(self) -> None:
        """Take the reserve again, after something was deleted whose space may be had now."""
        async with self._writing:  # or it would be taken from a deletion that it was lent to
            await self._dialect.restock()

    async def close(self) -> None:
        """Close every connection."""
        await self._read.dispose()

    @contextlib.contextmanager
    def _failures(self) -> Iterator[None]:
        """Errors of the driver that are nobody's defect become ours."""
        try:
            yield
        except (PoolTimeoutError, ConnectionError, StaleDataError) as error:  # the last: a row has changed meanwhile
            raise RegistryBusyError from error
        except DBAPIError as error:
            known = self._dialect.meaning(error)
            if known is None:
                raise
            if isinstance(known, RegistryDamagedError):
                self._trouble.set()
                _log.critical("the registry is damaged", extra={"reason": str(error.orig)})
            raise known from error


def _migrate(connection: Connection) -> None:
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS))
    config.attributes["connection"] = connection
    command.upgrade(config, "head")
