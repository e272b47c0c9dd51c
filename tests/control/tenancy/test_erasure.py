"""Deleting a tenant takes all of it and nothing of anybody else's."""

from __future__ import annotations

import asyncio
import os
import time
from pathlib import Path

import pytest
from sqlalchemy import func, select

from tenora.control.control import Control
from tenora.control.registry.tables import Base
from tenora.control.tenancy.erasure import Erasure
from tenora.control.tenancy.records import Principal
from tenora.errors import AuthenticationError, ConflictError, NotFoundError, StorageFullError
from tests.control.conftest import (
    ImportAdapter,
    OpenControl,
    content_of,
    create_job,
    tenant,
    until,
    until_true,
    upload,
    workdir,
)
from tests.support.patience import PATIENCE
from tests.support.scripted_jobs import JobScript

NAMED = [table for table in Base.metadata.sorted_tables if "tenant_id" in table.columns]


async def rows_of(control: Control, tenant_id: str) -> dict[str, int]:
    """How many rows of each table name the tenant."""
    async with control._registry.database.read() as session:
        return {
            table.name: await session.scalar(
                select(func.count()).select_from(table).where(table.c.tenant_id == tenant_id)
            )
            or 0
            for table in NAMED
        }


async def furnish(control: Control, who: Principal, import_adapter: ImportAdapter, seed: int) -> None:
    """Something in every table: a file, a finished job with its checkpoint and adapter, a pin, a kept answer."""
    job = await create_job(control, who, name="desk")
    assert (await until(control, who, job.id)).status == "succeeded"
    await import_adapter(control, who, "shelf", seed=seed)
    await import_adapter(control, who, "shared", seed=99)
    await control.adapters.pin(who, "shelf", True)
    await control.idempotency.begin(who, "POST /v1/files", "key", b"payload")


def test_every_table_of_tenants_things_names_the_tenant() -> None:
    assert {table.name for table in Base.metadata.sorted_tables} - {table.name for table in NAMED} == {
        "tenants",
        "processes",
    }


async def test_all_of_a_tenant_goes_and_nothing_of_another(
    control: Control, script: JobScript, home: Path, import_adapter: ImportAdapter
) -> None:
    acme, umbrella = await tenant(control, "acme"), await tenant(control, "umbrella")
    await furnish(control, acme, import_adapter, 1)
    await furnish(control, umbrella, import_adapter, 2)
    before = await rows_of(control, umbrella.tenant_id)
    mine = {(await control.adapters.get(acme, name)).digest for name in ("desk", "shelf")}
    pinned = (await control.adapters.get(acme, "shelf")).digest
    theirs = {(await control.adapters.get(umbrella, name)).digest for name in ("desk", "shelf", "shared")}
    assert all(before.values()), before
    assert mine - theirs
    assert mine & theirs, "equal content is stored once"
    await control.erasure.erase("acme")
    assert not any((await rows_of(control, acme.tenant_id)).values())
    assert not (home / "tenants" / acme.tenant_id).exists()
    assert (mine - theirs).isdisjoint(control._blobs.store.list())
    assert script.pinned[pinned] is False
    assert mine - theirs <= set(script.evicted)
    assert script.forgotten == [acme.tenant_id]
    with pytest.raises(NotFoundError):
        await control.tenants.get("acme")
    assert await rows_of(control, umbrella.tenant_id) == before
    assert theirs <= set(control._blobs.store.list())
    assert theirs.isdisjoint(script.evicted)
    for record in (await control.files.list(umbrella)).items:
        assert await content_of(control, umbrella, record.id)
    with pytest.raises(NotFoundError):
        await control.erasure.erase("acme")


async def test_its_jobs_end_and_leave_nothing(control: Control, script: JobScript, home: Path) -> None:
    acme = await tenant(control, "acme")
    script.hold_at = 2
    job = await create_job(control, acme)
    async with asyncio.timeout(PATIENCE):
        await script.until_held()
    await control.erasure.erase("acme")
    assert (job.id, False) in script.stopped
    await until_true(lambda: not control._runner._works)
    assert not workdir(home, acme, job.id).exists()
    assert control._blobs.store.list() == ()


async def test_a_run_that_saves_its_state_once_more_before_it_ends_leaves_nothing(
    control: Control, script: JobScript, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    acme, told = await tenant(control, "acme"), []
    script.hold_at = 2
    job = await create_job(control, acme)
    async with asyncio.timeout(PATIENCE):
        await script.until_held()
    leave = control._runner.leave

    async def later(tenant_id: str, job_id: str, *, pause: bool) -> None:
        told.append((tenant_id, job_id, pause))

    monkeypatch.setattr(control._runner, "leave", later)
    await control.erasure.erase("acme")
    assert told == [(acme.tenant_id, job.id, False)]
    workdir(home, acme, job.id).mkdir(parents=True)
    await leave(acme.tenant_id, job.id, pause=False)
    await until_true(lambda: not control._runner._works)
    assert not workdir(home, acme, job.id).exists()


async def test_a_deletion_that_was_cut_off_is_ended_by_the_next(
    control: Control, acme: Principal, import_adapter: ImportAdapter
) -> None:
    await furnish(control, acme, import_adapter, 1)
    _, secret = await control.keys.create(acme.tenant_id, ["infer"])

    class Full:
        async def end_for(self, tenant_id: str) -> None:
            raise StorageFullError("The disk is full.")

    cut_off = Erasure(control._registry.database, control.tenants, control.keys, [Full()], [])
    with pytest.raises(StorageFullError):
        await cut_off.erase("acme")
    with pytest.raises(AuthenticationError):
        await control.keys.authenticate(secret)
    assert (await rows_of(control, acme.tenant_id))["files"]
    await control.erasure.erase("acme")
    assert not any((await rows_of(control, acme.tenant_id)).values())


async def test_files_that_a_dead_process_left_behind_are_swept(
    open_control: OpenControl, home: Path, import_adapter: ImportAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    await furnish(control, acme, import_adapter, 1)
    monkeypatch.setattr(control.erasure, "_holders", [])  # as if the process had died once the rows were gone
    await control.erasure.erase("acme")
    assert control._blobs.store.list()
    await control.close()
    for path in [*(home / "adapters").rglob("*"), *(home / "tenants").rglob("*")]:
        os.utime(path, (time.time() - 5, time.time() - 5))  # the sweep counts whole seconds
    control = await open_control()
    assert control._blobs.store.list() == ()
    assert [path for path in (home / "tenants" / acme.tenant_id).rglob("*") if path.is_file()] == []


async def test_an_upload_that_was_under_way_finds_no_tenant_and_leaves_nothing(
    control: Control, acme: Principal, home: Path, import_adapter: ImportAdapter
) -> None:
    await upload(control, acme)
    await control.erasure.erase("acme")
    for late in (upload(control, acme), import_adapter(control, acme, "late")):
        with pytest.raises(ConflictError, match="deleted meanwhile"):
            await late
    assert control._blobs.store.list() == ()
    assert [path for path in (home / "tenants").rglob("*") if path.is_file()] == []


async def test_the_default_tenant_stays(control: Control) -> None:
    await control.tenants.ensure("default")
    with pytest.raises(ConflictError):
        await control.erasure.erase("default")
    assert (await control.tenants.get("default")).name == "default"
