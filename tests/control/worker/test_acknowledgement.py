"""What of a run is recorded is acknowledged, and nothing else; what a resumed run says again is recorded once."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tenora.control.control import Control
from tenora.control.jobs.records import JobEventRecord
from tenora.control.registry.database import RegistryBusyError
from tenora.control.tenancy.records import Principal
from tenora.control.worker.training import JobTraining
from tests.control.conftest import OpenControl, create_job, tenant, until
from tests.support.scripted_jobs import JobScript


async def lines(control: Control, who: Principal, job_id: str) -> list[JobEventRecord]:
    """Those with numbers, oldest first."""
    page = await control.jobs.events(who, job_id, limit=100)
    return [event for event in reversed(page.items) if event.type == "metrics"]


async def test_what_is_recorded_is_acknowledged(control: Control, acme: Principal, script: JobScript) -> None:
    script.hold_end = True  # a run that is over is told no more
    job = await create_job(control, acme)
    # An evaluation of the start, the steps, an evaluation and its checkpoint; that it has finished is no such thing.
    await script.until(lambda: script.acknowledged.get(job.id) == 1 + script.steps + 2)
    script.go_on()
    assert (await until(control, acme, job.id)).status == "succeeded"
    assert all(spec.acknowledged for spec in script.specs)
    assert script.acknowledged == {job.id: 1 + script.steps + 2}


async def test_what_was_not_recorded_is_not_acknowledged_nor_anything_after_it(
    open_control: OpenControl, script: JobScript, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The registry is busy while the service stops: the run's last words wait for the next start."""
    control = await open_control()
    acme = await tenant(control, "acme")
    script.steps, script.hold_at, script.in_flight = 8, 3, 100
    job = await create_job(control, acme)
    await script.until_held()
    write, failed = JobTraining._lines, asyncio.Event()

    async def busy_once(self: JobTraining, *args: Any) -> None:
        if self._closing.is_set() and not failed.is_set():
            failed.set()
            raise RegistryBusyError
        await write(self, *args)

    monkeypatch.setattr(JobTraining, "_lines", busy_once)
    before, script.hold_end = dict(script.acknowledged), True  # a run that is over would be told nothing anyway
    closing = asyncio.create_task(control.close())
    await failed.wait()
    script.go_on()
    await closing
    assert script.acknowledged == before
    script.in_flight, script.retold = 0, 9
    control = await open_control()
    assert (await until(control, acme, job.id)).status == "succeeded"
    steps = [line.data["step"] for line in await lines(control, acme, job.id) if "train_loss" in line.data]
    assert steps == list(range(1, 9))


async def test_what_is_said_again_is_recorded_once(open_control: OpenControl, script: JobScript) -> None:
    control = await open_control()
    acme = await tenant(control, "acme")
    script.hold_at = 3
    job = await create_job(control, acme)
    await script.until_held()
    await control.close()
    script.hold_at = None
    script.retold = 4  # the evaluation of the start and two steps were recorded, the third step was not
    control = await open_control()
    done = await until(control, acme, job.id)
    said = await lines(control, acme, job.id)
    assert [line.message.partition(":")[0] for line in said] == [
        "Step 0",
        *(f"Step {step}/4" for step in (1, 2, 3, 4)),
        "Step 4/4",
    ]
    assert done.trained_tokens == 40


async def test_a_trial_whose_end_is_only_said_again_is_in_the_table(
    control: Control, acme: Principal, script: JobScript
) -> None:
    script.retold = 100
    job = await create_job(control, acme, sweep={"rank": [4, 8, 16]}, seed=5)
    done = await until(control, acme, job.id)
    assert [one["status"] for one in done.sweep_results or ()] == ["failed", "finished", "stopped"]
    assert len(await lines(control, acme, job.id)) == 6
