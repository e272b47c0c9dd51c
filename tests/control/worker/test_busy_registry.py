"""A registry that is busy for a while: runs go on, and jobs are taken up again."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tenora.control.jobs import rows as job_rows
from tenora.control.registry import database
from tenora.control.worker import runner
from tenora.control.worker import training as job_training
from tests.control.conftest import (
    OpenControl,
    create_job,
    messages,
    tenant,
    until,
    until_true,
)
from tests.support.scripted_jobs import JobScript


@pytest.fixture
def hold_registry(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """`with hold_registry():` another process writes; ours give up after 50 ms instead of ten seconds."""
    monkeypatch.setattr("tenora.control.registry.dialects.dialect.BUSY_MILLISECONDS", 50)
    monkeypatch.setattr(job_training, "BUSY_SECONDS", 0.01)

    @contextlib.contextmanager
    def hold() -> Iterator[None]:
        blocker = sqlite3.connect(home / "tenora.db", isolation_level=None)
        blocker.execute("BEGIN IMMEDIATE")
        try:
            yield
        finally:
            blocker.close()

    return hold


@pytest.mark.sqlite
async def test_a_busy_registry_is_no_stop_of_the_engine(
    hold_registry: Callable[[], contextlib.AbstractContextManager[None]],
    open_control: OpenControl,
    script: JobScript,
    caplog: pytest.LogCaptureFixture,
) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    script.hold_at = 2
    job = await create_job(control, acme)
    await script.until_held()
    with hold_registry():
        script.go_on()
        await until_true(lambda: caplog.text.count("Its run goes on") >= 2)
    done = await until(control, acme, job.id)
    assert done.status == "succeeded"
    said = await messages(control, acme, job.id)
    assert not any("engine" in line for line in said)
    steps = [line for line in said if line.startswith("Step ")]
    assert [line.partition(":")[0] for line in steps if "training" in line] == [f"Step {n}/4" for n in range(1, 5)]
    assert len(script.specs) == 1
    async with control._registry.database.read() as session:
        assert (await job_rows.find_job(session, acme.tenant_id, job.id)).attempts == 0


async def test_a_registry_that_is_busy_when_a_run_begins_does_not_fail_the_job(
    open_control: OpenControl,
    script: JobScript,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The worker lets go of it, and it is claimed again when the lease has run out."""
    begin, begun = job_training.JobTraining._begin, 0

    async def busy_once(self: job_training.JobTraining) -> None:
        nonlocal begun
        begun += 1
        if begun == 1:
            raise database.RegistryBusyError
        await begin(self)

    monkeypatch.setattr(job_training.JobTraining, "_begin", busy_once)
    monkeypatch.setattr(runner, "RENEW_SECONDS", 0.2)
    control = await open_control()
    acme = await tenant(control, "acme")
    job = await create_job(control, acme)
    await until_true(lambda: "It goes on then" in caplog.text)
    async with control._registry.database.write() as session:
        (await job_rows.find_job(session, acme.tenant_id, job.id)).lease_expires_at = 0
    assert (await until(control, acme, job.id)).status == "succeeded"
    assert begun == 2
