"""`init_from`: a job goes on from another adapter of its tenant."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenora.control.control import Control
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.shape import Limits, ParentShape, lora_spec
from tenora.control.tenancy.records import Principal
from tenora.errors import InvalidRequestError, ModelNotFoundError
from tests.control.conftest import (
    BASE,
    ImportAdapter,
    OpenControl,
    create_job,
    messages,
    tenant,
    until,
    until_true,
    upload,
    without_engine,
)
from tests.support.scripted_jobs import JobScript

LIMITS = Limits(BASE, 64, 256, ("q_proj", "k_proj", "v_proj"))
PARENT = ParentShape(rank=4, scaling=2.0, use_rslora=False, target_modules=frozenset({"q_proj", "v_proj"}))


@pytest.mark.parametrize(
    ("asked", "rank", "alpha", "modules"),
    [
        ({}, 4, 8.0, ("q_proj", "v_proj")),
        ({"rank": 16}, 16, 32.0, ("q_proj", "v_proj")),  # the same scaling
        ({"rank": 16, "alpha": 8.0}, 16, 8.0, ("q_proj", "v_proj")),
        ({"use_rslora": True, "rank": 16}, 16, 8.0, ("q_proj", "v_proj")),  # 8 / √16 = 2
        ({"target_modules": "all-linear"}, 4, 8.0, ("q_proj", "k_proj", "v_proj")),
        ({"target_modules": ["v_proj", "q_proj"]}, 4, 8.0, ("q_proj", "v_proj")),
    ],
)
def test_the_shape_is_the_parents_unless_asked_otherwise(
    asked: dict[str, Any], rank: int, alpha: float, modules: tuple[str, ...]
) -> None:
    found = lora_spec(asked, LIMITS, PARENT, usual_rank=8)
    assert (found.rank, found.alpha, found.target_modules) == (rank, alpha, modules)


@pytest.mark.parametrize(
    ("asked", "param", "reason"),
    [
        ({"rank": 2}, "lora.rank", "has rank 4"),
        ({"target_modules": ["q_proj"]}, "lora.target_modules", "leaves out v_proj"),
        ({"rank": 65}, "lora.rank", "from 1 to 64"),
    ],
)
def test_what_would_drop_something_of_the_parent_is_refused(asked: dict[str, Any], param: str, reason: str) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as caught:
        lora_spec(asked, LIMITS, PARENT)
    assert caught.value.param == param


async def test_every_name_of_an_adapter_may_be_the_start(
    control: Control, acme: Principal, script: JobScript, import_adapter: ImportAdapter
) -> None:
    first = await until(control, acme, (await create_job(control, acme, name="desk", lora={"rank": 8})).id)
    (checkpoint,) = (await control.jobs.checkpoints(acme, first.id)).items
    job_digest = (await control.adapters.get(acme, "desk")).digest
    imported = await import_adapter(control, acme, "mine", seed=3)
    starts = {
        "mine": imported.digest,
        "acme/mine": imported.digest,
        f"mine@{imported.digest[:12]}": imported.digest,
        str(first.fine_tuned_model): job_digest,
        checkpoint.fine_tuned_model_checkpoint: job_digest,  # the scripted run's only one is its result
    }
    for name, digest in starts.items():
        for fields in ({"lora": {"init_from": name}}, {"model": name}):
            file = await upload(control, acme)
            request = JobRequest(
                **{"model": BASE, "training_file": file.id, "name": "next", "publish": "always", **fields}
            )
            job = await until(control, acme, (await control.jobs.create(acme, request)).id)
            assert job.status == "succeeded", job.error
            assert (job.parent, job.parent_digest, job.model) == (name, digest, fields.get("model", BASE))
            spec = script.specs[-1]
            assert Path(spec.init_path).name == digest
            assert (Path(spec.init_path) / "adapter_config.json").is_file()
            assert spec.lora.rank == (4 if digest == imported.digest else 8)
            version = await control.adapters.get(acme, "next")
            assert (version.parent, version.parent_digest, version.base_model) == (name, digest, BASE)
            assert str(job.fine_tuned_model).startswith(f"ft:{BASE}:acme:")
    assert script.specs[-1].lora.target_modules == script.specs[0].lora.target_modules
    assert f"Training starts from {name} (version {digest[:12]})" in await messages(control, acme, job.id)
    assert script.specs[0].init_path == ""
    assert (await control.adapters.get(acme, "desk")).parent == BASE


async def test_another_tenants_adapter_is_a_missing_one(
    control: Control, acme: Principal, umbrella: Principal, import_adapter: ImportAdapter
) -> None:
    theirs = await import_adapter(control, umbrella, "theirs")
    file = await upload(control, acme)
    for fields, param in (({"lora": {"init_from": "?"}}, "lora.init_from"), ({"model": "?"}, "model")):
        told = set()
        for name in ("theirs", "nobody", "umbrella/theirs", f"theirs@{theirs.digest[:12]}", "ft:x:y:z:1"):
            filled = {key: {"init_from": name} if key == "lora" else name for key in fields}
            with pytest.raises(ModelNotFoundError) as caught:
                await control.jobs.create(acme, JobRequest(**{"model": BASE, "training_file": file.id, **filled}))
            told.add((caught.value.message.replace(name, "?"), caught.value.code, caught.value.param))
        assert told == {(ModelNotFoundError("?").message, "model_not_found", param)}
    assert (await control.jobs.list(acme)).items == []


async def test_what_does_not_fit_is_refused_before_anything_is_stored(
    control: Control, acme: Principal, import_adapter: ImportAdapter
) -> None:
    await import_adapter(control, acme, "small", rank=4)
    await import_adapter(control, acme, "other", rank=4, seed=1)
    file = await upload(control, acme)
    for fields, param in (
        ({"lora": {"init_from": "small", "rank": 2}}, "lora.rank"),
        ({"lora": {"init_from": "small", "target_modules": ["q_proj"]}}, "lora.target_modules"),
        ({"lora": {"init_from": "small"}, "sweep": {"rank": [2, 8]}}, "sweep.rank"),
        ({"lora": {"init_from": "small"}, "model": "other"}, "lora.init_from"),
        ({"lora": {"init_from": "small@00"}}, "lora.init_from"),
    ):
        with pytest.raises((InvalidRequestError, ModelNotFoundError)) as caught:
            await control.jobs.create(acme, JobRequest(**{"model": BASE, "training_file": file.id, **fields}))
        assert caught.value.param == param
    assert (await control.jobs.list(acme)).items == []
    both = {"model": "small", "lora": {"init_from": "acme/small"}}  # two names of one adapter
    assert (await control.jobs.create(acme, JobRequest(training_file=file.id, **both))).parent == "acme/small"


async def test_the_parent_lives_as_long_as_a_job_may_need_it(
    open_control: OpenControl, script: JobScript, import_adapter: ImportAdapter, home: Path
) -> None:
    control = await open_control(max_running_jobs=1)
    acme = await tenant(control, "acme")
    digest = (await import_adapter(control, acme, "mine")).digest
    blob = home / "adapters" / digest[:2] / digest
    script.hold_at = 2
    jobs = [await create_job(control, acme, lora={"init_from": "mine"}) for _ in range(2)]
    await script.until_held()
    await control.adapters.delete(acme, "mine")
    assert blob.is_dir()
    await control.close()
    control = await open_control(max_running_jobs=1)  # whose sweep finds no other row that names the blob
    assert blob.is_dir()
    await script.until_held()
    await control.jobs.pause(acme, jobs[0].id)
    await control.jobs.cancel(acme, jobs[1].id)
    await until_true(lambda: not control._runner._works)
    assert blob.is_dir()
    script.hold_at = None
    await control.jobs.resume(acme, jobs[0].id)
    assert (await until(control, acme, jobs[0].id)).status == "succeeded"
    assert Path(script.specs[-1].init_path) == blob
    await until_true(lambda: not blob.exists())
    assert (await control.jobs.get(acme, jobs[0].id)).parent_digest == digest


async def test_cancelling_a_waiting_job_lets_go_of_its_parent(
    control: Control, acme: Principal, script: JobScript, import_adapter: ImportAdapter, home: Path
) -> None:
    digest = (await import_adapter(control, acme, "mine")).digest
    await without_engine(control.engine, script)
    job = await create_job(control, acme, lora={"init_from": "mine"})
    await until(control, acme, job.id, "queued")
    await control.adapters.delete(acme, "mine")
    await control.jobs.cancel(acme, job.id)
    await until_true(lambda: not (home / "adapters" / digest[:2] / digest).exists())
