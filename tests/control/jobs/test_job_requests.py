"""What may be asked for, by whom, and what is listed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from tenora.api.schemas.fine_tuning import JobCreateRequest
from tenora.control.control import Control
from tenora.control.jobs.records import JobRequest
from tenora.control.jobs.requests import check_request
from tenora.control.jobs.shape import Limits
from tenora.control.tenancy.records import Principal
from tenora.errors import (
    InvalidRequestError,
    ModelNotFoundError,
    NotFoundError,
)
from tenora.training.settings import SETTINGS, Setting
from tenora.training.spec import LORA
from tests.control.conftest import (
    BASE,
    ROWS,
    create_job,
    jsonl,
    pieces,
    until,
    upload,
)
from tests.support.scripted_jobs import JobScript


def supervised(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "supervised", "supervised": {"hyperparameters": hyperparameters}}


def dpo(**hyperparameters: Any) -> dict[str, Any]:
    return {"type": "dpo", "dpo": {"hyperparameters": hyperparameters}}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"suffix": "a:b"}, "suffix"),
        ({"suffix": "a" * 65}, "suffix"),
        ({"suffix": BASE}, "suffix"),
        ({"name": BASE}, "name"),
        ({"name": BASE.upper()}, "name"),
        ({"name": "a b"}, "name"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**31}, "seed"),
        ({"seed": True}, "seed"),
        ({"metadata": {"a": 1}}, "metadata"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"metadata": {'quo"te': "x"}}, "metadata"),
        ({"hyperparameters": {"n_epochs": 0}}, "n_epochs"),
        ({"hyperparameters": {"n_epochs": "many"}}, "n_epochs"),
        ({"hyperparameters": {"batch_size": 1.5}}, "batch_size"),
        ({"hyperparameters": {"epochs": 3}}, "hyperparameters.epochs"),
        ({"lora": {"rank": 0}}, "lora.rank"),
        ({"lora": {"rank": 257}}, "lora.rank"),
        ({"lora": {"rank": "16"}}, "lora.rank"),
        ({"lora": {"alpha": 0}}, "lora.alpha"),
        ({"lora": {"alpha": float("nan")}}, "lora.alpha"),
        ({"lora": {"dropout": 1.0}}, "lora.dropout"),
        ({"lora": {"target_modules": ["lm_head"]}}, "lora.target_modules"),
        ({"lora": {"target_modules": []}}, "lora.target_modules"),
        ({"lora": {"use_rslora": "yes"}}, "lora.use_rslora"),
        ({"lora": {"use_dora": True}}, "lora.use_dora"),
        ({"lora": {"init_from": 3}}, "lora.init_from"),
        ({"scheduler": "step"}, "scheduler"),
        ({"warmup_ratio": 2}, "warmup_ratio"),
        ({"weight_decay": -1}, "weight_decay"),
        ({"max_grad_norm": 0}, "max_grad_norm"),
        ({"max_seq_length": 4096}, "max_seq_length"),
        ({"max_steps": 0.5}, "max_steps"),
        ({"eval_interval": -1}, "eval_interval"),
        ({"truncate": 1}, "truncate"),
        ({"packing": "no"}, "packing"),
        ({"early_stopping": -1}, "early_stopping"),
        ({"early_stopping": 1.5}, "early_stopping"),
        ({"learning_rate": 2}, "learning_rate"),
        ({"learning_rate": 1e-3, "hyperparameters": {"learning_rate_multiplier": 2}}, "learning_rate_multiplier"),
        ({"n_epochs": 51}, "n_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"n_epochs": 2, "hyperparameters": {"n_epochs": 3}}, "n_epochs"),
        ({"batch_size": 2, "method": supervised(batch_size="auto")}, "batch_size"),
        ({"hyperparameters": {"n_epochs": 2}, "method": supervised(n_epochs=3)}, "hyperparameters.n_epochs"),
        ({"method": {"type": "ppo"}}, "method.type"),
        ({"method": {"type": "supervised", "supervised": {"x": 1}}}, "method.supervised.x"),
        ({"method": {"type": "supervised", "dpo": {}}}, "method.dpo"),
        ({"method": supervised(beta=0.1)}, "method.supervised.hyperparameters.beta"),
        ({"method": dpo(beta=0)}, "beta"),
        ({"method": dpo(beta="much")}, "beta"),
    ],
)
async def test_bad_requests_name_the_field(
    control: Control, acme: Principal, fields: dict[str, Any], param: str
) -> None:
    file = await upload(control, acme)
    with pytest.raises(InvalidRequestError) as caught:
        await control.jobs.create(acme, JobRequest(**{"model": BASE, "training_file": file.id, **fields}))
    assert caught.value.param == param
    assert (await control.jobs.list(acme)).items == []


async def test_hyperparameters_in_the_method_count(control: Control, acme: Principal, script: JobScript) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 5}}}
    job = await create_job(control, acme, method=method)
    assert (await until(control, acme, job.id)).method == method
    assert script.specs[0].n_epochs == 5


async def test_files_must_be_training_files_of_the_tenant(
    control: Control, acme: Principal, umbrella: Principal
) -> None:
    good = await upload(control, acme)
    theirs = await upload(control, umbrella)
    other = await control.files.create(acme, filename="a", purpose="user_data", chunks=pieces(jsonl(ROWS)))
    broken = await control.files.create(acme, filename="a", purpose="fine-tune", chunks=pieces(b"{\n{\n"))
    for field in ("training_file", "validation_file"):
        for file_id, error in (
            (theirs.id, NotFoundError),
            ("file-none", NotFoundError),
            (other.id, InvalidRequestError),
            (broken.id, InvalidRequestError),
        ):
            fields: dict[str, Any] = {"training_file": good.id, field: file_id}
            with pytest.raises(error) as caught:
                await control.jobs.create(acme, JobRequest(model=BASE, **fields))
            assert caught.value.param == field
    assert (await control.jobs.list(acme)).items == []


async def test_listing(control: Control, acme: Principal, umbrella: Principal) -> None:
    ids = [(await create_job(control, acme, metadata={"index": str(i), "all": "yes"})).id for i in range(3)]
    theirs = await create_job(control, umbrella, metadata={"all": "yes"})
    for job_id in ids:
        await until(control, acme, job_id)
    await until(control, umbrella, theirs.id)
    assert [job.id for job in (await control.jobs.list(acme)).items] == ids[::-1]
    page = await control.jobs.list(acme, limit=2)
    assert ([job.id for job in page.items], page.has_more) == (ids[:0:-1], True)
    assert [job.id for job in (await control.jobs.list(acme, after=ids[1])).items] == ids[:1]
    found = await control.jobs.list(acme, metadata={"index": "1", "all": "yes"})
    assert [job.id for job in found.items] == [ids[1]]
    for nothing in ({"index": "7"}, {'a"] or 1=1': "x"}, {"none": "x"}):
        assert (await control.jobs.list(acme, metadata=nothing)).items == []
    events = await control.jobs.events(acme, ids[0], limit=3)
    assert (len(events.items), events.has_more) == (3, True)
    rest = await control.jobs.events(acme, ids[0], after=events.items[-1].id, limit=1000)
    assert rest.items[-1].message == f"Created fine-tuning job: {ids[0]}"
    assert not rest.has_more


async def test_another_tenants_job_is_a_missing_one(control: Control, acme: Principal, umbrella: Principal) -> None:
    theirs = await until(control, umbrella, (await create_job(control, umbrella)).id)
    event = (await control.jobs.events(umbrella, theirs.id)).items[0]
    mine = await until(control, acme, (await create_job(control, acme)).id)
    for call in (
        control.jobs.get,
        control.jobs.cancel,
        control.jobs.pause,
        control.jobs.resume,
        control.jobs.events,
        control.jobs.checkpoints,
    ):
        seen = set()
        for job_id in (theirs.id, "ftjob-" + "0" * 24):
            with pytest.raises(NotFoundError) as caught:
                await call(acme, job_id)
            seen.add((caught.value.message.replace(job_id, "?"), caught.value.code, caught.value.param))
        assert len(seen) == 1
    for cursor in (event.id, theirs.id):
        with pytest.raises(InvalidRequestError):
            await control.jobs.events(acme, mine.id, after=cursor)
        with pytest.raises(InvalidRequestError):
            await control.jobs.list(acme, after=cursor)
    assert theirs.fine_tuned_model is not None
    for name in (theirs.fine_tuned_model, f"{theirs.fine_tuned_model}:ckpt-step-4", theirs.name):
        with pytest.raises(ModelNotFoundError):
            await control.inference.resolve(acme, name, None)
    with pytest.raises(NotFoundError):
        await control.files.get(acme, theirs.result_files[0])


def edges(setting: Setting) -> Iterator[float]:
    """The bounds of a number, and what lies next to them."""
    for bound in (setting.least, setting.above, setting.most):
        if math.isfinite(bound):
            if setting.kind is int:
                yield from (int(bound) - 1, int(bound), int(bound) + 1)
            else:
                yield from (math.nextafter(bound, -math.inf), bound, math.nextafter(bound, math.inf))


def takes(check: Callable[[], object]) -> bool:
    try:
        check()
    except (ValidationError, InvalidRequestError):
        return False
    return True


@pytest.mark.parametrize("name", [name for name, one in {**SETTINGS, **LORA}.items() if one.kind in {int, float}])
def test_a_number_has_the_same_bounds_in_the_schema_and_in_the_check(name: str) -> None:
    setting = {**SETTINGS, **LORA}[name]
    limits = Limits(base_id=BASE, max_rank=256, max_model_len=2**31 - 1, target_modules=("q_proj",))
    for value in edges(setting):
        fields = {name: value} if name in SETTINGS else {"lora": {name: value}}
        sent: dict[str, Any] = {"model": BASE, "training_file": "file-1", **fields}
        by_schema = takes(lambda sent=sent: JobCreateRequest.model_validate(sent))  # type: ignore[misc]
        by_check = takes(lambda sent=sent: check_request(JobRequest(**sent), limits))  # type: ignore[misc]
        assert (value, by_schema, by_check) == (value, setting.holds(value), setting.holds(value))
