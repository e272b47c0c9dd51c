"""/v1/fine_tuning/jobs: the SDK's shapes, and every field that may be sent."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tenora.api.schemas.fine_tuning import JobCreateRequest
from tests.api.conftest import Service, upload

JOBS = "/v1/fine_tuning/jobs"


@pytest.fixture
async def file_id(service: Service) -> str:
    return str((await upload(service.client("train"))).json()["id"])


async def create(service: Service, base_id: str, file_id: str, **fields: Any) -> httpx.Response:
    body = {"model": base_id, "training_file": file_id, **fields}
    return await service.client("train").post(JOBS, json=body)


async def test_a_job_has_every_field_of_the_sdk(service: Service, base_id: str, file_id: str) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2, "batch_size": "auto"}}}
    response = await create(
        service,
        base_id,
        file_id,
        method=method,
        seed=7,
        suffix="fox",
        name="fox",
        metadata={"a": "b"},
        lora={"rank": 8, "target_modules": ["q_proj"]},
        learning_rate=1e-3,
        truncate=True,
    )
    job = response.json()
    assert response.status_code == 200, response.text
    assert job["id"].startswith("ftjob-")
    tenant = await service.control.tenants.get("default")
    expected = {
        "object": "fine_tuning.job",
        "model": base_id,
        "status": "validating_files",
        "training_file": file_id,
        "validation_file": None,
        "organization_id": tenant.id,
        "result_files": [],
        "seed": 7,
        "error": None,
        "fine_tuned_model": None,
        "finished_at": None,
        "trained_tokens": None,
        "estimated_finish": None,
        "integrations": None,
        "metadata": {"a": "b"},
        "name": "fox",
        "suffix": "fox",
    }
    assert {name: job[name] for name in expected} == expected
    assert job["hyperparameters"]["n_epochs"] == 2
    assert job["method"]["type"] == "supervised"
    assert job["method"]["supervised"]["hyperparameters"]["n_epochs"] == 2
    assert job["lora"]["rank"] == 8


async def test_listing_and_filters(service: Service, base_id: str, file_id: str) -> None:
    ids = [(await create(service, base_id, file_id, metadata={"n": str(n)})).json()["id"] for n in range(3)]
    client = service.client("train")
    page = (await client.get(JOBS, params={"limit": 2})).json()
    assert ([job["id"] for job in page["data"]], page["has_more"]) == (ids[:0:-1], True)
    rest = (await client.get(JOBS, params={"after": ids[1]})).json()
    assert ([job["id"] for job in rest["data"]], rest["has_more"]) == ([ids[0]], False)
    found = (await client.get(JOBS, params={"metadata[n]": "1"})).json()
    assert [job["id"] for job in found["data"]] == [ids[1]]
    assert (await client.get(JOBS, params={"metadata[n]": "9"})).json()["data"] == []
    for malformed in ("metadata", "metadata[n", "metadata[]"):
        refused = await client.get(JOBS, params={malformed: "n"})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "metadata")
    assert len((await client.get(JOBS, params={"metadata": "null"})).json()["data"]) == 3  # as the SDK writes None


async def test_a_filter_that_a_listing_does_not_have_is_refused_by_name(
    service: Service, base_id: str, file_id: str
) -> None:
    job = (await create(service, base_id, file_id)).json()["id"]
    client = service.client("train")
    for listing, known in (
        (JOBS, "after, limit, metadata"),
        (f"{JOBS}/{job}/events", "after, limit"),
        (f"{JOBS}/{job}/checkpoints", "after, limit"),
        ("/v1/files", "after, limit, order, purpose"),
    ):
        for name in ("status", "limit[n]", "pupose"):
            refused = await client.get(listing, params={name: "running", "limit": 1})
            error = refused.json()["error"]
            assert (refused.status_code, error["param"], error["code"]) == (400, name, "unknown_parameter")
            assert error["message"] == f"Unknown query parameter {name!r}. This call takes {known}."
    assert (await client.get("/v1/files", params={"metadata[n]": "1"})).status_code == 400


async def test_steering(service: Service, base_id: str, file_id: str) -> None:
    client = service.client("train")
    job_id = (await create(service, base_id, file_id)).json()["id"]
    assert (await client.get(f"{JOBS}/{job_id}")).json()["id"] == job_id
    assert (await client.post(f"{JOBS}/{job_id}/resume")).status_code == 409
    cancelled = await client.post(f"{JOBS}/{job_id}/cancel")
    assert cancelled.json()["status"] == "cancelled"
    again = await client.post(f"{JOBS}/{job_id}/pause")
    assert again.status_code == 409
    assert again.headers["x-should-retry"] == "false"
    events = (await client.get(f"{JOBS}/{job_id}/events")).json()
    assert events["object"] == "list"
    event = events["data"][0]
    assert set(event) == {"id", "object", "created_at", "level", "message", "type", "data"}
    assert event["object"] == "fine_tuning.job.event"
    assert (await client.get(f"{JOBS}/{job_id}/checkpoints")).json()["data"] == []


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({"typo": 1}, 400, "typo"),
    ({"lora": {"typo": 1}}, 400, "lora.typo"),
    ({"lora": {"rank": 0}}, 400, "lora.rank"),
    ({"lora": {"rank": 257}}, 400, "lora.rank"),
    ({"lora": {"target_modules": []}}, 400, "lora.target_modules"),
    ({"lora": {"target_modules": ["nothing"]}}, 400, "lora.target_modules"),
    ({"hyperparameters": {"n_epochs": 0}}, 400, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"n_epochs": "many"}}, 400, "hyperparameters.n_epochs"),
    ({"hyperparameters": {"batch_size": 1.5}}, 400, "hyperparameters.batch_size"),
    ({"hyperparameters": {"n_epochs": True}}, 400, "hyperparameters.n_epochs"),
    ({"training": {"learning_rate": 1e-3}}, 400, "training"),
    ({"scheduler": "magic"}, 400, "scheduler"),
    ({"learning_rate": 0}, 400, "learning_rate"),
    ({"packing": 1}, 400, "packing"),
    ({"early_stopping": "soon"}, 400, "early_stopping"),
    ({"n_epochs": 0}, 400, "n_epochs"),
    ({"n_epochs": 2, "hyperparameters": {"n_epochs": 3}}, 400, "n_epochs"),
    ({"method": {"type": "ppo"}}, 400, "method.type"),
    ({"method": {"type": "supervised", "dpo": {}}}, 400, "method.dpo"),
    ({"method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 0}}}}, 400, "method.dpo.hyperparameters.beta"),
    ({"suffix": "x" * 65}, 400, "suffix"),
    ({"suffix": "a b"}, 400, "suffix"),
    ({"name": "Not A Name"}, 400, "name"),
    ({"seed": -1}, 400, "seed"),
    ({"seed": True}, 400, "seed"),
    ({"max_steps": True}, 400, "max_steps"),  # and not one step
    ({"eval_interval": True}, 400, "eval_interval"),
    ({"learning_rate": True}, 400, "learning_rate"),
    ({"lora": {"rank": True}}, 400, "lora.rank"),
    ({"metadata": {str(i): "x" for i in range(17)}}, 400, "metadata"),
    ({"metadata": {"a": "x" * 513}}, 400, "metadata.a"),
    ({"integrations": [{"type": "wandb"}]}, 400, "integrations"),
    ({"model": "other"}, 404, "model"),
    ({"lora": {"init_from": "other"}}, 404, "lora.init_from"),
    ({"lora": {"init_from": ""}}, 400, "lora.init_from"),
    ({"training_file": None}, 400, "training_file"),
    ({"training_files": [{"file": "file-x"}]}, 400, "training_file"),
    ({"training_file": None, "training_files": []}, 400, "training_files"),
    ({"training_file": None, "training_files": [{"file": "a", "wait": 1}]}, 400, "training_files[0].wait"),
    ({"training_file": None, "training_files": [{"file": "file-none"}]}, 404, "training_files[0].file"),
    ({"sweep": {}}, 400, "sweep"),
    ({"sweep": {"alpha": [1, 2]}}, 400, "sweep.alpha"),
    ({"sweep": {"rank": "8"}}, 400, "sweep.rank"),
    ({"sweep": {"rank": [8, 16], "sampler": "tpe"}}, 400, "sweep.sampler"),
    ({"training_file": "file-none"}, 404, "training_file"),
    ({"validation_file": "file-none"}, 404, "validation_file"),
]


async def test_refused_fields_are_named(service: Service, base_id: str, file_id: str) -> None:
    told = []
    for fields, _, _ in REFUSED:
        response = await create(service, base_id, file_id, **fields)
        told.append((response.status_code, response.json()["error"]["param"]))
    assert told == [(status, param) for _, status, param in REFUSED]
    assert (await service.client("train").get(JOBS)).json()["data"] == []


async def test_hyperparameters_in_two_places_must_agree(service: Service, base_id: str, file_id: str) -> None:
    method = {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": 2}}}
    clash = await create(service, base_id, file_id, method=method, hyperparameters={"n_epochs": 3})
    assert clash.json()["error"]["param"] == "hyperparameters.n_epochs"
    assert (await create(service, base_id, file_id, method=method, hyperparameters={"n_epochs": 2})).status_code == 200


async def test_the_same_post_twice_is_one_job(service: Service, base_id: str, file_id: str) -> None:
    client = service.client("train")
    body = {"model": base_id, "training_file": file_id}
    headers = {"idempotency-key": "job-1"}
    first = await client.post(JOBS, json=body, headers=headers)
    again = await client.post(JOBS, json=body, headers=headers)
    assert first.content == again.content
    other = await client.post(JOBS, json={**body, "seed": 1}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_mismatch")
    assert len((await client.get(JOBS)).json()["data"]) == 1


def test_a_whole_number_that_stands_for_any_is_taken_without_a_warning(base_id: str) -> None:
    asked = {"beta": 1, "learning_rate_multiplier": 2, "n_epochs": "auto"}
    body = {"model": base_id, "training_file": "file-1", "method": {"type": "dpo", "dpo": {"hyperparameters": asked}}}
    assert JobCreateRequest.model_validate(body).to_request().method == body["method"]
