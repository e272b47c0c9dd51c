"""SQLite's dialect with one memory for all of a process's registries.

SQLAlchemy keeps compiled statements by engine and dialect, and every test opens a registry of its own: without this,
each compiles all its statements anew, which is a third of what such a test computes.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine
from sqlalchemy.dialects import registry
from sqlalchemy.dialects.sqlite.aiosqlite import SQLiteDialect_aiosqlite
from sqlalchemy.util import LRUCache

_compiled: LRUCache[Any, Any] = LRUCache(2000)


class _One(type):
    """Of a class of this kind there is one object."""

    made: Any = None

    def __call__(cls, *arguments: Any, **named: Any) -> Any:
        if cls.made is None:
            cls.made = super().__call__(*arguments, **named)
        return cls.made


class RememberingDialect(SQLiteDialect_aiosqlite, metaclass=_One):
    """The dialect of every registry on SQLite in this process."""

    supports_statement_cache = True

    @classmethod
    def engine_created(cls, engine: Engine) -> None:
        engine.update_execution_options(compiled_cache=_compiled)


def remember_statements() -> None:
    """Have every registry that this process opens from now on use what others have compiled."""
    registry.register("sqlite.aiosqlite", __name__, RememberingDialect.__name__)
