"""Which dialect a URL means."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from tenora.control.registry.dialects.dialect import Dialect
from tenora.control.registry.dialects.postgres import Postgres
from tenora.control.registry.dialects.sqlite import SQLite
from tenora.errors import ConfigurationError

DIALECTS: Final[Mapping[str, Callable[[URL], Dialect]]] = {
    "sqlite": SQLite,
    "sqlite+aiosqlite": SQLite,
    "postgresql": Postgres,
    "postgresql+asyncpg": Postgres,
}


def dialect_of(url: str) -> Dialect:
    """The database that a URL names.

    Raises:
        ConfigurationError: it names none that can hold the registry. The URL, which may hold a password, is not told.
    """
    try:
        parsed = make_url(url)
        make = DIALECTS[parsed.drivername]
    except (ArgumentError, KeyError, ValueError):
        # `from None`: the message of the cause may quote the URL.
        raise ConfigurationError(
            "TENORA_DATABASE_URL must be postgresql://user:password@host/database or sqlite+aiosqlite:///path; "
            "leave it out for SQLite in the state directory."
        ) from None
    return make(parsed)
