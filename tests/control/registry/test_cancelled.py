"""Transactions, and connections, whose task is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, make_url, text

from tenora.config import Settings
from tenora.control.registry.database import Database
from tenora.control.registry.dialects import sqlite

LONG = text(
    "UPDATE alembic_version SET version_num = version_num || (WITH RECURSIVE n(x) AS"
    " (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 3000000) SELECT count(*) FROM n) RETURNING version_num"
)


@pytest.fixture
async def database(home: Path, registry_url: str | None, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    monkeypatch.setattr("tenora.control.registry.dialects.dialect.BUSY_MILLISECONDS", 2000)
    await asyncio.to_thread(home.mkdir)
    opened = await Database.open(Settings(home=home, database_url=registry_url).database)
    yield opened
    await opened.close()


async def test_a_write_that_is_cancelled_within_a_statement_holds_up_no_other(database: Database) -> None:
    begun = asyncio.Event()

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "RECURSIVE" in statement:
            begun.set()

    event.listen(database._write.sync_engine, "before_cursor_execute", note)

    async def write() -> None:
        async with database.write() as session:
            await session.execute(LONG)

    task = asyncio.create_task(write())
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as kept:  # its traceback, and with it every frame and cursor
        await task
    async with database.write() as session:
        await session.execute(text("UPDATE alembic_version SET version_num = version_num"))
    assert kept.tb is not None


@pytest.mark.parametrize("setting", ["journal_mode", "synchronous", "foreign_keys", "busy_timeout"])
async def test_a_connection_that_is_cancelled_while_it_is_set_up_is_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str
) -> None:
    loop, begun, goes_on, closed = asyncio.get_running_loop(), asyncio.Event(), threading.Event(), threading.Event()

    class Held(sqlite._Connection):
        """Stays within the statement that sets it."""

        def __init__(self, *args: Any, **keywords: Any) -> None:
            super().__init__(*args, **keywords)
            self.set_trace_callback(self._hold)

        def _hold(self, statement: str) -> None:
            if setting in statement:
                loop.call_soon_threadsafe(begun.set)
                goes_on.wait()

        def close(self) -> None:
            super().close()
            closed.set()

    monkeypatch.setattr(sqlite, "_Connection", Held)
    engine, _ = await sqlite.SQLite(make_url(f"sqlite:///{tmp_path}/registry.db")).connect()
    task = asyncio.ensure_future(engine.connect().start())
    await begun.wait()
    task.cancel()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert closed.is_set()
    await engine.dispose()
