"""POST /v1/fine_tuning/estimate: a job's body, answered with what the job would take."""

from __future__ import annotations

from typing import Any

import pytest

from tests.api.conftest import Service, upload

PATH = "/v1/fine_tuning/estimate"
ROWS = "".join(f'{{"prompt": "Number {n} is", "completion": " {n * 7919} and more."}}\n' for n in range(60))


@pytest.fixture
async def file_id(service: Service) -> str:
    return str((await upload(service.client("train"), ROWS)).json()["id"])


async def test_it_answers_what_a_job_with_the_same_body_would_do(service: Service, base_id: str, file_id: str) -> None:
    client = service.client("train")
    body = {"model": base_id, "training_file": file_id, "n_epochs": 2, "batch_size": 9, "seed": 3, "suffix": "x"}
    answer = await client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found.pop("tasks")[0] == {
        "name": "rows",
        "file": file_id,
        "weight": 1.0,
        "rows": 54,
        "held_out_rows": 6,
        "tokens": found["tokens"],
        "near_duplicates": 0,
        "near_duplicate_pairs": [],
    }
    tokens = {name: found.pop(name) for name in ("tokens", "trained_tokens", "read_tokens", "measured_tokens")}
    assert 54 < tokens["trained_tokens"] < tokens["tokens"] < tokens["read_tokens"] < 2 * tokens["tokens"]
    assert found == {
        "object": "fine_tuning.estimate",
        "rows": 54,
        "held_out_rows": 6,
        "truncated": 0,
        "left_out": 0,
        "near_duplicates": 0,
        "n_epochs": 2,
        "batch_size": 9,
        "folds": 0,
        "trials": 0,
        "steps": 12,
        "evaluations": 3,
        "tokens_per_second": None,
        "seconds": None,
        "measured": False,
        "publish": "if_better",
        "min_gain": 0.0,
        "replaces": None,
    }
    assert (await client.get("/v1/fine_tuning/jobs")).json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"n_epochs": 0}, 400, "n_epochs"),
        ({"colour": "red"}, 400, "colour"),
        ({"training_file": "file-none"}, 404, "training_file"),
        ({"method": {"type": "dpo"}}, 422, "training_file"),
        ({"max_seq_length": 8}, 422, "training_file"),
        ({"model": "nobody"}, 404, "model"),
    ],
)
async def test_what_a_job_would_be_refused_for_is_refused(
    service: Service, base_id: str, file_id: str, fields: dict[str, Any], status: int, param: str
) -> None:
    body = {"model": base_id, "training_file": file_id, **fields}
    answer = await service.client("train").post(PATH, json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)


async def test_only_ones_own_files(service: Service, base_id: str, file_id: str) -> None:
    body = {"model": base_id, "training_file": file_id}
    assert (await service.client("infer").post(PATH, json=body)).status_code == 403
    assert (await service.client("train", tenant="other").post(PATH, json=body)).status_code == 404
