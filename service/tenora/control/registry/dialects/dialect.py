"""What the registry needs of a database beyond SQL that all of them speak."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

from sqlalchemy import BigInteger
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.sql.functions import FunctionElement

from tenora.errors import TenoraError

BUSY_MILLISECONDS = 10_000  # how long a transaction waits for another one before it is refused


class unix_time(FunctionElement[int]):  # noqa: N801 (a function of SQL)
    """The database's own clock in whole seconds of Unix time: one clock for all processes that share the registry."""

    type = BigInteger()
    inherit_cache = True


class Dialect(Protocol):
    """One kind of database at one URL.

    Attributes:
        shown: the URL as it may be told: without its password.
        one_writer: the database takes one write transaction at a time, whatever it writes.
    """

    shown: str
    one_writer: bool

    async def connect(self) -> tuple[AsyncEngine, AsyncEngine]:
        """One pool of connections, as two engines: for transactions that see one snapshot, and for those that write.

        Raises:
            ConfigurationError: the database cannot be had.
        """
        ...

    async def begin_alone(self, connection: AsyncConnection) -> None:
        """First in a write transaction: wait until no other that began so, in any process, is under way."""
        ...

    async def begin_migration(self, connection: AsyncConnection) -> None:
        """First in the transaction that migrates: wait, however long, until no other process migrates."""
        ...

    def meaning(self, error: DBAPIError) -> TenoraError | None:
        """The error of ours that says the same as the driver's code; None if it is nobody's fault but ours."""
        ...

    def unusable(self, error: DBAPIError | OSError) -> TenoraError:
        """Why the database that failed so when it was opened cannot be used: a sentence for the operator."""
        ...

    async def check(self, engine: AsyncEngine) -> None:
        """Read what this process alone is responsible for, as a server does before it relies on it.

        Raises:
            ConfigurationError: it is damaged.
        """
        ...

    def room(self, *, frees: bool) -> contextlib.AbstractAsyncContextManager[Any]:
        """Around a write transaction: one that deletes something may use the space that is kept for it."""
        ...

    async def restock(self) -> None:
        """Take the kept space again, after something was deleted."""
        ...
