"""Which databases hold the registry, and what both of them promise."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import sqlalchemy
from sqlalchemy import func, select

from tenora.config import Settings
from tenora.control.registry.database import Database
from tenora.control.registry.dialects.by_url import DIALECTS
from tenora.control.registry.tables import TenantRow
from tenora.errors import ConfigurationError
from tests.control.conftest import OpenControl, tenant
from tests.support.patience import PATIENCE
from tests.support.postgres import Postgres

PASSWORD = "hunter2"


@pytest.fixture
async def settings(open_control: OpenControl) -> Settings:
    control = await open_control()
    await tenant(control, "acme")
    return control.settings


@pytest.fixture
async def two(settings: Settings) -> AsyncIterator[tuple[Database, Database]]:
    """As two processes have it open."""
    opened = await Database.open(settings.database), await Database.open(settings.database)
    yield opened
    for database in opened:
        await database.close()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://u:hunter2@h/d",
        "postgres://u:hunter2@h/d",
        "postgresql+psycopg://u:hunter2@h/d",
        "sqlite+pysqlite:///x.db",
        "hunter2",
        "postgresql://u:hunter2@h:port/d",
        "",
    ],
)
async def test_other_urls_are_refused_with_what_to_write(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"TENORA_DATABASE_URL must be postgresql://.*sqlite") as caught:
        await Database.open(url)
    assert PASSWORD not in caught.value.message
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_every_kind_has_a_file_of_its_own() -> None:
    assert {dialect.__module__.rpartition(".")[2] for dialect in DIALECTS.values()} == {"sqlite", "postgres"}  # type: ignore[attr-defined]


async def test_parameters_that_are_not_known_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"'sslcert'.*sslmode"):
        await Database.open("postgresql://u:hunter2@h/d?sslcert=x")


async def test_the_password_is_never_told(postgres: Postgres, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    for url in (postgres.url("nowhere"), "postgresql://u:hunter2@127.0.0.1:1/d", f"{postgres.url('x')}?ssl=require"):
        assert PASSWORD in url
        with pytest.raises(ConfigurationError, match=r"postgresql://\w+:\*\*\*@") as caught:
            await Database.open(url)
        told = f"{caught.value} {caught.value.__cause__!r} {Settings(database_url=url)!r} {Settings(database_url=url)}"
        assert PASSWORD not in told
    assert PASSWORD not in caplog.text


async def test_those_that_open_an_empty_database_at_once_migrate_it_once(postgres: Postgres) -> None:
    url = await postgres.empty()
    opened = await asyncio.gather(*(Database.open(url) for _ in range(4)))
    try:
        async with opened[0].read() as session:
            assert (await session.execute(sqlalchemy.text("SELECT count(*) FROM alembic_version"))).scalar_one() == 1
            assert await session.scalar(select(func.count()).select_from(TenantRow)) == 0
    finally:
        for database in opened:
            await database.close()


async def test_what_a_write_has_read_stays_true_until_it_commits(two: tuple[Database, Database]) -> None:
    async def count_up(database: Database) -> None:
        async with database.write() as session:
            row = (await session.scalars(select(TenantRow).where(TenantRow.name == "acme"))).one()
            await asyncio.sleep(0)
            row.train_turn += 1

    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(count_up(database) for database in two for _ in range(10)))
    async with two[0].read() as session:
        assert await session.scalar(select(TenantRow.train_turn).where(TenantRow.name == "acme")) == 20


async def test_a_read_sees_one_snapshot(two: tuple[Database, Database]) -> None:
    reader, writer = two
    async with reader.read() as session:
        before = await session.scalar(select(func.count()).select_from(TenantRow))
        async with writer.write() as other:
            other.add(TenantRow(id="t", name="late", created_at=1))
        assert await session.scalar(select(func.count()).select_from(TenantRow)) == before


async def test_connections_that_the_server_has_ended_are_replaced(postgres: Postgres) -> None:
    url = await postgres.database()
    database = await Database.open(url)
    other = await Database.open(url)
    end = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    try:
        async with database.read() as session:
            await session.scalar(select(1))
        async with other.write() as session:
            await session.execute(sqlalchemy.text(end))
        async with database.read() as session:
            assert await session.scalar(select(1)) == 1
    finally:
        await database.close()
        await other.close()
