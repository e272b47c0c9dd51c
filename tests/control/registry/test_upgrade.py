"""A state directory that an older version left."""

from __future__ import annotations

from pathlib import Path

import pytest
from alembic import command
from alembic.config import Config
from sqlalchemy import create_engine

from tenora.control.registry.database import MIGRATIONS
from tenora.engine.client.client import AsyncEngine
from tests.control.conftest import MANY_ROWS, OpenControl, create_job, messages, tenant, until, upload, without_engine
from tests.support.scripted_jobs import JobScript


@pytest.mark.sqlite
async def test_after_an_upgrade_jobs_go_on_and_cross_validations_begin_anew(
    open_control: OpenControl, engine: AsyncEngine, script: JobScript, home: Path
) -> None:
    control = await open_control(max_running_jobs=2)
    acme = await tenant(control, "acme")
    await without_engine(engine, script)
    many = (await upload(control, acme, MANY_ROWS)).id
    few, plain = await create_job(control, acme), await create_job(control, acme, training_file=many)
    for job in (few, plain):
        await until(control, acme, job.id, "queued")
    await control.close()
    engine_of = create_engine(f"sqlite:///{home / 'tenora.db'}")
    with engine_of.begin() as connection:  # as the first release left it
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        command.downgrade(config, "0001")
    engine_of.dispose()
    script.come_back()
    control = await open_control()
    for job, again in ((few, True), (plain, False)):
        assert (await until(control, acme, job.id)).status == "succeeded"
        line = "The prepared rows are missing; the files are read again"
        assert (line in await messages(control, acme, job.id)) is again
