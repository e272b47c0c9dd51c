"""What may come between a job and its end: cancel, pause, engine deaths, restarts, lost leases, defects."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tenora.control.control import Control
from tenora.control.jobs import rows as job_rows
from tenora.control.jobs.rows import find_job
from tenora.control.tenancy.records import Principal
from tenora.control.worker import publication
from tenora.control.worker import training as job_training
from tenora.control.worker.training import MAX_ATTEMPTS
from tenora.engine.client.client import AsyncEngine
from tenora.errors import ConflictError, StorageFullError
from tests.control.conftest import (
    OpenControl,
    content_of,
    create_job,
    messages,
    tenant,
    until,
    until_true,
    upload,
    without_engine,
    workdir,
)
from tests.support.scripted_jobs import JobScript


async def test_cancel(control: Control, acme: Principal, script: JobScript, home: Path) -> None:
    script.hold_at = 2
    file = await upload(control, acme)
    job = await create_job(control, acme, name="desk", training_file=file.id)
    await script.until_held()
    with pytest.raises(ConflictError, match=job.id):
        await control.files.delete(acme, file.id)
    cancelled = await control.jobs.cancel(acme, job.id)
    assert (cancelled.status, cancelled.fine_tuned_model) == ("cancelled", None)
    assert cancelled.finished_at is not None
    assert script.stopped == [(job.id, False)]
    await until_true(lambda: not workdir(home, acme, job.id).exists())
    with pytest.raises(ConflictError, match="cancelled"):
        await control.jobs.cancel(acme, job.id)
    for call in (control.jobs.pause, control.jobs.resume):
        with pytest.raises(ConflictError):
            await call(acme, job.id)
    assert (await control.jobs.get(acme, job.id)).status == "cancelled"
    assert await control.adapters.list(acme) == []
    said = await messages(control, acme, job.id)
    assert said[-1] == "The job was cancelled"
    await control.files.delete(acme, file.id)


async def test_cancel_while_it_publishes_wins(
    control: Control, acme: Principal, script: JobScript, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    """The blob is stored and the cancellation commits before the publishing transaction: nothing is published."""
    reached, go_on = asyncio.Event(), asyncio.Event()
    write = publication.write_results

    async def slow(*args: Any) -> Any:
        reached.set()
        await go_on.wait()
        return await write(*args)

    monkeypatch.setattr(publication, "write_results", slow)
    job = await create_job(control, acme, name="desk")
    await reached.wait()
    await control.jobs.cancel(acme, job.id)
    go_on.set()
    await until_true(lambda: not workdir(home, acme, job.id).exists())
    assert (await control.jobs.get(acme, job.id)).status == "cancelled"
    assert await control.adapters.list(acme) == []
    assert [one.purpose for one in (await control.files.list(acme)).items] == ["fine-tune"]
    digests = {path.name for path in (home / "adapters").glob("??/*")}
    (checkpoint,) = (await control.jobs.checkpoints(acme, job.id)).items
    assert len(digests) == 1  # the checkpoint's, which was kept before the cancellation
    assert (await control.inference.resolve(acme, checkpoint.fine_tuned_model_checkpoint, None)).adapter is not None


async def test_pause_and_resume(control: Control, acme: Principal, script: JobScript, home: Path) -> None:
    script.hold_at = 3
    job = await create_job(control, acme, name="desk")
    await script.until_held()
    assert (await control.jobs.pause(acme, job.id)).status == "paused"
    assert script.stopped == [(job.id, True)]
    with pytest.raises(ConflictError, match="paused"):
        await control.jobs.pause(acme, job.id)
    assert workdir(home, acme, job.id).exists()
    script.hold_at = None
    assert (await control.jobs.resume(acme, job.id)).status == "queued"
    done = await until(control, acme, job.id)
    assert done.status == "succeeded"
    said = await messages(control, acme, job.id)
    assert [line for line in said if "paused" in line or "resumed" in line] == [
        "The job was paused",
        "The job was resumed",
        "Fine-tuning job resumed from its last saved state",
    ]
    assert len(script.specs) == 2
    assert script.specs[0] == script.specs[1]
    with pytest.raises(ConflictError):
        await control.jobs.pause(acme, job.id)


async def test_a_pause_loses_no_event(control: Control, acme: Principal, script: JobScript) -> None:
    """Steps that are on their way when the run is asked to end are in the log before it says that it was paused."""
    script.steps, script.hold_at, script.in_flight = 8, 3, 3
    job = await create_job(control, acme)
    await script.until_held()
    paused = await control.jobs.pause(acme, job.id)
    assert paused.status == "paused"
    page = await control.jobs.events(acme, job.id, limit=100)
    said = [event.message for event in reversed(page.items)]
    steps = [event.data["step"] for event in reversed(page.items) if "train_loss" in event.data]
    assert steps == [1, 2, 3, 4, 5]
    assert said[-1] == "The job was paused"
    assert (await control.jobs.get(acme, job.id)).trained_tokens == 50
    script.hold_at = None
    await control.jobs.resume(acme, job.id)
    assert (await until(control, acme, job.id)).status == "succeeded"


async def test_a_pause_whose_end_nobody_told_is_told_when_the_job_is_resumed(
    control: Control, acme: Principal, script: JobScript
) -> None:
    """The worker died between the two, and no other has come yet."""
    script.hold_at = 3
    job = await create_job(control, acme)
    await script.until_held()
    async with control._registry.database.write() as session:
        row = await find_job(session, acme.tenant_id, job.id, writes=True)
        row.status, row.lease_token, row.lease_expires_at = "paused", row.lease_token + 1, 1
    script.go_on()
    await control.jobs.resume(acme, job.id)
    assert (await until(control, acme, job.id)).status == "succeeded"
    said = await messages(control, acme, job.id)
    assert [line for line in said if "paused" in line or line == "The job was resumed"] == [
        "The job was paused",
        "The job was resumed",
    ]


async def test_a_run_that_ends_while_its_job_is_paused_publishes_when_it_is_resumed(
    control: Control, acme: Principal, script: JobScript
) -> None:
    script.steps, script.hold_at, script.in_flight = 4, 3, 100
    job = await create_job(control, acme, name="desk")
    await script.until_held()
    assert (await control.jobs.pause(acme, job.id)).status == "paused"
    assert (await control.jobs.get(acme, job.id)).status == "paused"
    assert await control.adapters.list(acme) == []
    script.hold_at, script.in_flight = None, 0
    await control.jobs.resume(acme, job.id)
    assert (await until(control, acme, job.id)).status == "succeeded"
    assert len(await control.adapters.list(acme)) == 1


async def test_a_job_that_is_paused_while_it_waits_for_the_engine_is_let_go(
    control: Control, acme: Principal, script: JobScript
) -> None:
    script.die_at, script.away = 2, True
    job = await create_job(control, acme)
    await until_true(lambda: bool(control._runner._works) and not control.engine.alive)
    await control.jobs.pause(acme, job.id)
    await until_true(lambda: not control._runner._works)
    script.die_at = None
    script.come_back()
    await control.jobs.resume(acme, job.id)
    assert (await until(control, acme, job.id)).status == "succeeded"


async def test_a_queued_job_can_be_paused_and_cancelled(
    open_control: OpenControl, script: JobScript, home: Path
) -> None:
    control = await open_control(max_running_jobs=1)
    acme = await tenant(control, "acme")
    script.hold_at = 1
    running = await create_job(control, acme)
    await script.until_held()
    waiting = [await create_job(control, acme) for _ in range(3)]
    for job in waiting:
        await until(control, acme, job.id, "queued")
    assert len(script.specs) == 1
    await control.jobs.pause(acme, waiting[0].id)
    await control.jobs.cancel(acme, waiting[1].id)
    assert not workdir(home, acme, waiting[1].id).exists()
    script.go_on()
    assert (await until(control, acme, running.id)).status == "succeeded"
    assert (await until(control, acme, waiting[2].id)).status == "succeeded"
    assert (await control.jobs.get(acme, waiting[0].id)).status == "paused"
    await control.jobs.resume(acme, waiting[0].id)
    assert (await until(control, acme, waiting[0].id)).status == "succeeded"


async def test_the_engine_dies_and_the_job_goes_on(control: Control, acme: Principal, script: JobScript) -> None:
    script.die_at = 2
    job = await create_job(control, acme)
    done = await until(control, acme, job.id)
    assert done.status == "succeeded"
    said = await messages(control, acme, job.id)
    assert any("goes on from its last saved state when it is back (attempt 1 of 5)" in line for line in said)
    assert said.count("Fine-tuning job resumed from its last saved state") == 1
    rows = (await content_of(control, acme, done.result_files[0])).decode().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "0", "1", "2", "3", "4"]  # step 1 was done twice


async def test_a_job_waits_for_the_engine(
    control: Control, acme: Principal, engine: AsyncEngine, script: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    awaited, wait_alive = asyncio.Event(), engine.wait_alive

    async def wait() -> None:
        awaited.set()
        await wait_alive()

    monkeypatch.setattr(engine, "wait_alive", wait)
    await without_engine(engine, script)
    job = await create_job(control, acme)
    await until(control, acme, job.id, "queued")
    await awaited.wait()
    assert script.specs == []
    script.come_back()
    assert (await until(control, acme, job.id)).status == "succeeded"


async def test_the_engine_may_not_die_for_ever(control: Control, acme: Principal, script: JobScript) -> None:
    events = script.training

    def always(spec: Any) -> Any:
        script.die_at = 1
        return events(spec)

    script.training = always  # every run dies
    job = await until(control, acme, (await create_job(control, acme)).id)
    assert job.status == "failed"
    assert job.error is not None
    assert job.error["code"] == "engine_lost"
    assert len(script.specs) == MAX_ATTEMPTS


async def test_a_restart_goes_on(open_control: OpenControl, script: JobScript, home: Path) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    script.hold_at = 3
    job = await create_job(control, acme, name="desk")
    await script.until_held()
    await control.close()
    assert script.stopped == [(job.id, True)]
    script.hold_at = None
    leftover = workdir(home, acme, "ftjob-leftover")
    leftover.mkdir()
    control = await open_control()
    done = await until(control, acme, job.id)
    assert done.status == "succeeded"
    assert "Fine-tuning job resumed from its last saved state" in await messages(control, acme, job.id)
    assert script.specs[0] == script.specs[1]
    assert not leftover.exists()
    assert (await control.adapters.get(acme, "desk")).version == 1


async def test_lost_rows_are_read_again(
    open_control: OpenControl, engine: AsyncEngine, script: JobScript, home: Path
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    await without_engine(engine, script)
    job = await create_job(control, acme)
    await until(control, acme, job.id, "queued")
    await control.close()
    shutil.rmtree(workdir(home, acme, job.id))
    script.come_back()
    control = await open_control()
    assert (await until(control, acme, job.id)).status == "succeeded"
    assert "The prepared rows are missing; the files are read again" in await messages(control, acme, job.id)


async def test_a_serving_role_trains_nothing(open_control: OpenControl, script: JobScript) -> None:
    def claiming() -> bool:
        return any(task.get_name() == "job-runner" for task in asyncio.all_tasks())

    control = await open_control(role="serve")
    acme = await tenant(control, "acme")
    job = await create_job(control, acme)
    assert not claiming()
    assert (await control.jobs.get(acme, job.id)).status == "validating_files"
    await control.close()
    control = await open_control()
    assert claiming()
    assert (await until(control, acme, job.id)).status == "succeeded"


async def test_a_worker_that_lost_its_lease_writes_nothing(
    control: Control, acme: Principal, script: JobScript
) -> None:
    """A process that slept past its lease: another took the job, so this one's publish is refused."""
    script.hold_at = 2
    job = await create_job(control, acme, name="desk")
    await script.until_held()
    async with control._registry.database.write() as session:
        row = await job_rows.find_job(session, acme.tenant_id, job.id)
        row.lease_owner, row.lease_token = "another-boot", row.lease_token + 1
        row.lease_expires_at = (row.lease_expires_at or 0) + 1000
    before = await messages(control, acme, job.id)
    script.hold_at = 4
    script.wake()
    await until_true(lambda: not control._runner._works)
    assert await messages(control, acme, job.id) == before
    assert (await control.jobs.get(acme, job.id)).status == "running"
    assert await control.adapters.list(acme) == []
    assert script.stopped == [(job.id, True)]
    assert control.jobs.leases_lost == 1


async def test_a_job_that_its_tenant_takes_is_no_lost_lease(
    control: Control, acme: Principal, script: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(*_: Any, **__: Any) -> None:
        """The worker hears of it only from the registry."""

    script.hold_at = 2
    job = await create_job(control, acme)
    await script.until_held()
    monkeypatch.setattr(control._runner, "leave", nothing)
    await control.jobs.pause(acme, job.id)
    script.hold_at = 4
    script.wake()
    await until_true(lambda: not control._runner._works)
    assert script.stopped == [(job.id, True)]
    assert control.jobs.leases_lost == 0


async def test_a_full_disk_for_a_checkpoint_does_not_end_the_run(
    control: Control, acme: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def full(*_: Any) -> None:
        raise StorageFullError("The disk is full.")

    monkeypatch.setattr(job_training, "keep_checkpoint", full)
    assert (await until(control, acme, (await create_job(control, acme)).id)).status == "succeeded"


async def test_a_defect_ends_the_job_and_nothing_else(
    control: Control,
    acme: Principal,
    script: JobScript,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def defect(*_: Any) -> Any:
        raise ZeroDivisionError("secret detail")

    monkeypatch.setattr(job_training, "Eta", defect)
    job = await until(control, acme, (await create_job(control, acme)).id)
    assert (job.status, job.error and job.error["code"]) == ("failed", "internal_error")
    assert "secret detail" not in json.dumps(dict(job.error or {}))
    monkeypatch.undo()
    assert (await until(control, acme, (await create_job(control, acme)).id)).status == "succeeded"
