"""A full fine-tuning as a job: a real process trains a real base, and the model is there to be downloaded."""

from __future__ import annotations

import asyncio
import io
import os
import signal
import tarfile
from pathlib import Path

import pytest
import torch
import transformers

from tenora.control.control import Control
from tenora.control.tenancy.records import Principal
from tenora.engine import apart
from tenora.engine.apart import ApartTrainer
from tenora.errors import InvalidRequestError
from tenora.training.full.merged import digest_of
from tests.control.conftest import MANY_ROWS, OpenControl, content_of, create_job, messages, tenant, until, upload
from tests.support.scripted_jobs import JobScript

FULL = {"type": "full", "full": {"hyperparameters": {"n_epochs": 2}, "serve_as": "none"}}


@pytest.fixture
async def control(open_control: OpenControl) -> Control:
    """Its processes have one thread: of many that wait for each other, a small base is none the quicker."""
    return await open_control(threads=1)


async def test_its_result_is_a_model_that_transformers_loads_and_nothing_is_called(
    control: Control, acme: Principal, script: JobScript, tmp_path: Path
) -> None:
    file = await upload(control, acme, MANY_ROWS)
    created = await create_job(control, acme, training_file=file.id, method=FULL, name="whole", learning_rate=1e-3)
    job = await until(control, acme, created.id)
    said = await messages(control, acme, job.id)
    assert job.status == "succeeded", (job.error, said)
    assert script.specs == []  # the engine that serves has trained nothing
    assert (job.fine_tuned_model, job.published) == (None, None)
    archive = await content_of(control, acme, job.result_files[-1])
    await asyncio.to_thread(unpack, archive, tmp_path / "model")
    (readme,) = (tmp_path / "model").glob("README.md")
    text = readme.read_text()
    evaluation = job.evaluation
    assert evaluation is not None
    assert f"`{evaluation['full_model']['digest']}`" in text
    assert "library_name: transformers" in text
    assert evaluation["parity"] is None
    assert evaluation["full_model"]["served"] is False
    assert evaluation["full_model"]["valid_loss"] == evaluation["valid_loss"] < evaluation["base_loss"]
    readme.unlink()
    assert digest_of(tmp_path / "model") == evaluation["full_model"]["digest"]
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.dtype == torch.float32
    assert any("validation loss" in line for line in said)
    assert any("No adapter was made of the model" in line for line in said)


def unpack(archive: bytes, directory: Path) -> None:
    with tarfile.open(fileobj=io.BytesIO(archive)) as files:
        files.extractall(directory, filter="data")


@pytest.mark.full  # it starts two processes
async def test_a_process_that_is_killed_is_started_again_and_goes_on(
    control: Control, acme: Principal, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: list[int] = []
    start = asyncio.create_subprocess_exec

    async def noting(*arguments: object, **options: object) -> asyncio.subprocess.Process:
        process = await start(*arguments, **options)  # type: ignore[arg-type]
        pids.append(process.pid)
        return process

    monkeypatch.setattr(apart.asyncio, "create_subprocess_exec", noting)
    file = await upload(control, acme, MANY_ROWS)
    created = await create_job(control, acme, training_file=file.id, method=FULL, eval_interval=2)
    await until(control, acme, created.id, "running", messages=["Step 2"])
    os.kill(pids[0], signal.SIGKILL)
    job = await until(control, acme, created.id)
    said = await messages(control, acme, job.id)
    assert (job.status, len(pids)) == ("succeeded", 2), said
    assert any("The training process stopped" in line for line in said)
    assert len([line for line in said if line.startswith("Step 3/")]) >= 1


async def test_one_that_does_not_fit_beside_the_rest_fails_with_the_bytes_and_starts_nothing(
    open_control: OpenControl, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ApartTrainer.__init__, "__defaults__", (lambda: 2**20,))
    control = await open_control()
    acme = await tenant(control, "acme")
    file = await upload(control, acme, MANY_ROWS)
    job = await until(control, acme, (await create_job(control, acme, training_file=file.id, method=FULL)).id)
    assert job.error is not None
    assert job.error["code"] == "insufficient_memory"
    assert "and 1,048,576 are available" in job.error["message"]


@pytest.mark.full  # it starts two processes
async def test_a_cancelled_one_ends_its_process(control: Control, acme: Principal) -> None:
    file = await upload(control, acme, MANY_ROWS)
    method = {"type": "full", "full": {"hyperparameters": {"n_epochs": 50}, "serve_as": "none"}}
    created = await create_job(control, acme, training_file=file.id, method=method)
    await until(control, acme, created.id, "running", messages=["Step 1/"])
    await control.jobs.cancel(acme, created.id)
    assert (await control.jobs.get(acme, created.id)).status == "cancelled"
    second = await create_job(control, acme, training_file=file.id, method=FULL)  # has to wait for that process' end
    assert (await until(control, acme, second.id)).status == "succeeded"


async def test_layers_that_are_not_there_are_refused_when_the_job_is_asked_for(
    control: Control, acme: Principal
) -> None:
    method = {"type": "full", "full": {"layers": "last 9"}}
    with pytest.raises(InvalidRequestError, match="numbers from 0 to 2") as refused:
        await create_job(control, acme, method=method)
    assert refused.value.param == "method.full.layers"
