"""The parts of a job's answer have types, and are answered to the byte as they are stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import pytest
from openai.types.fine_tuning import FineTuningJob

from tenora.api.schemas.job_parts import EventData, LineageSettingsObject
from tenora.api.schemas.jobs import JobObject
from tenora.control.jobs.records import JobRecord
from tenora.training.methods.table import METHODS
from tenora.training.settings import HYPERPARAMETERS, SETTINGS
from tenora_client import JobState
from tests.api.conftest import Service, upload

JOBS = "/v1/fine_tuning/jobs"
ASKED: dict[str, Any] = dict.fromkeys(HYPERPARAMETERS, "auto")
FOUND: dict[str, Any] = {"n_epochs": 3, "batch_size": 8, "learning_rate_multiplier": 1}
SHAPE: dict[str, Any] = {
    "rank": 8,
    "alpha": 16.0,
    "dropout": 0.0,
    "target_modules": ["q_proj"],
    "use_rslora": False,
    "lora_plus_ratio": 1.0,
    "init": "kaiming",
    "eva_rho": 2.0,
}
SWEPT = {name: value for name, value in SHAPE.items() if name not in {"rank", "alpha"}}
TRIAL: dict[str, Any] = {
    "trial": 0,
    "rank": 4,
    "alpha": 8.0,
    "learning_rate": 1e-3,
    "n_epochs": 3,
    "batch_size": 8,
    "status": "queued",
    "step": 0,
    "total_steps": None,
    "valid_loss": None,
    "winner": False,
    "reason": None,
}
RECORD = JobRecord(
    id="ftjob-1",
    tenant_id="tenant-1",
    tenant="default",
    model="base",
    status="validating_files",
    training_file="file-1",
    training_files=None,
    validation_file=None,
    hyperparameters=ASKED,
    lora={},
    settings={"publish": "if_better", "min_gain": 0.0},
    method=None,
    sweep=None,
    sweep_results=None,
    parent=None,
    parent_digest=None,
    suffix=None,
    name="fox",
    seed=0,
    metadata=None,
    created_at=1,
    finished_at=None,
    estimated_finish=None,
    fine_tuned_model=None,
    trained_tokens=None,
    error=None,
    result_files=(),
    evaluation=None,
    published=None,
)
RECORDS: Mapping[str, dict[str, Any]] = {
    "as asked for": {},
    "with a shape of whole numbers": {"lora": {"rank": 8, "alpha": 16, "dropout": 0, "target_modules": "all-linear"}},
    "in numbers": {"hyperparameters": FOUND, "lora": {**SHAPE, "init_from": "mine"}, "settings": {"truncate": True}},
    "of preferences": {
        "method": {"type": "dpo", "dpo": {"hyperparameters": {"beta": 1}}},
        "hyperparameters": {**ASKED, "beta": 1},
    },
    "of several files": {
        "training_files": [{"file": "file-1", "weight": 2.0, "name": "a"}, {"file": "b", "weight": 1.0, "name": "b"}]
    },
    "a sweep": {
        "hyperparameters": ASKED,
        "lora": SWEPT,
        "sweep": {"rank": [4, 8.0], "learning_rate": {"max": 1, "min": 0.0001, "log": None}, "trials": 2},
        "sweep_results": [TRIAL, {**TRIAL, "trial": 1, "status": "failed", "valid_loss": 2.5, "reason": "It broke."}],
    },
    "a sweep that is over": {  # the winner's settings came last
        "hyperparameters": {**FOUND, "learning_rate_multiplier": 0.4},
        "lora": {**SWEPT, "rank": 4, "alpha": 8.0},
        "sweep_results": [{**TRIAL, "status": "finished", "step": 9, "total_steps": 9, "winner": True}],
    },
    "of another release": {"lora": {"later": None, **SHAPE}, "sweep_results": [{**TRIAL, "seconds": 1.5}]},
}


def method_of(record: JobRecord) -> Any:
    kind = "supervised" if record.method is None else record.method["type"]
    return {"type": kind, kind: {"hyperparameters": record.hyperparameters}}


def stored(record: JobRecord) -> dict[str, Any]:
    """The parts as plain dictionaries."""
    names = ("training_files", "lora", "sweep", "sweep_results")
    return {
        "hyperparameters": {name: record.hyperparameters[name] for name in HYPERPARAMETERS},
        "method": method_of(record),
        **{name: getattr(record, name) for name in names},
        **{name: record.settings.get(name) for name in SETTINGS},
    }


def parts(text: str, names: Mapping[str, Any]) -> dict[str, str]:
    """The JSON text of each of these fields; reading keeps the order of fields, and 8 apart from 8.0."""
    answer = json.loads(text)
    return {name: json.dumps(answer[name]) for name in names}


@pytest.mark.parametrize("kind", RECORDS)
def test_a_part_is_answered_as_it_is_stored(kind: str) -> None:
    record = replace(RECORD, **RECORDS[kind])
    expected = stored(record)
    answered = parts(JobObject.of(record).model_dump_json(), expected)
    assert answered == {name: json.dumps(value) for name, value in expected.items()}


@pytest.mark.parametrize("kind", RECORDS)
def test_both_clients_understand_every_part(kind: str) -> None:
    text = JobObject.of(replace(RECORD, **RECORDS[kind])).model_dump_json()
    answer = json.loads(text)
    ours, openais = JobState.model_validate_json(text), FineTuningJob.model_validate_json(text)
    shown = ours.model_dump(mode="json")
    names = ("hyperparameters", "method", "training_files", "lora", "sweep", "sweep_results")
    assert {name: shown[name] for name in names} == {name: answer[name] for name in names}
    assert ours.hyperparameters.n_epochs == openais.hyperparameters.n_epochs == answer["hyperparameters"]["n_epochs"]
    assert ours.method is not None
    assert openais.method is not None
    assert ours.method.type == openais.method.type == answer["method"]["type"]


def test_the_settings_of_a_lineage_are_answered_as_they_are_stored() -> None:
    made = {"method": "dpo", "lora": SHAPE, "n_epochs": 3, "learning_rate": 1, "packing": True, "folds": 0, "beta": 0.1}
    assert json.dumps(json.loads(LineageSettingsObject.model_validate(made).model_dump_json())) == json.dumps(made)


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"step": 1, "total_steps": 2, "epoch": 1, "train_loss": None, "learning_rate": 1e-3, "margin": 0.5},
        {"valid_loss": 1.0, "step": 2, "best": 1, "valid_loss/fox": 2.0},
        {"trial": 0, "status": "stopped", "step": 3, "total_steps": 9, "valid_loss": None, "trained_tokens": 5},
    ],
)
def test_an_events_numbers_are_answered_as_they_are_stored(data: dict[str, Any]) -> None:
    assert json.dumps(json.loads(EventData.model_validate(data).model_dump_json())) == json.dumps(data)


async def test_every_route_answers_a_job_as_it_is_stored(service: Service, base_id: str) -> None:
    client = service.client("train")
    file_id = (await upload(client)).json()["id"]
    body = {
        "model": base_id,
        "training_files": [{"weight": 2, "file": file_id}],
        "sweep": {"trials": 2, "rank": {"max": 8, "min": 2}, "learning_rate": [0.001]},
    }
    made = await client.post(JOBS, json=body)
    assert made.status_code == 200, made.text
    one = await client.get(f"{JOBS}/{made.json()['id']}")
    (listed,) = (await client.get(JOBS)).json()["data"]
    ended = await client.post(f"{JOBS}/{made.json()['id']}/cancel")
    expected = {
        "training_files": [{"file": file_id, "weight": 2.0, "name": "train"}],
        "sweep": {"rank": {"max": 8, "min": 2}, "learning_rate": [0.001], "trials": 2},
    }
    for text in (made.text, one.text, json.dumps(listed), ended.text):
        assert parts(text, expected) == {name: json.dumps(value) for name, value in expected.items()}


def objects(document: dict[str, Any], schema: dict[str, Any], seen: set[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every field that an answer has, however deep, with its schema: `<class>.<field>`."""
    if (name := schema.get("$ref", "").rpartition("/")[2]) and name not in seen:
        seen.add(name)
        for field, inner in document["components"]["schemas"][name].get("properties", {}).items():
            yield f"{name}.{field}", inner
            yield from objects(document, inner, seen)
    for inner in (*schema.get("anyOf", ()), schema.get("items", {})):
        if inner:
            yield from objects(document, inner, seen)


def test_the_document_says_what_a_jobs_parts_hold(service: Service) -> None:
    document = service.app.openapi()
    fields: dict[str, dict[str, Any]] = {}
    for name in ("JobObject", "JobEventObject", "CheckpointObject", "EstimateObject"):
        fields |= objects(document, {"$ref": f"#/components/schemas/{name}"}, set())
    open_ended = {
        name
        for name, schema in fields.items()
        for one in (schema, schema.get("items", {}), *schema.get("anyOf", ()))
        if one.get("type") == "object" and one.get("additionalProperties") is True
    }
    assert open_ended == set()
    own = {
        f"{kind.title().replace('_', '')}HyperparametersObject.{one}"
        for kind, method in METHODS.items()
        for one in method.hyperparameters
    }
    assert own <= set(fields)
    assert {"LoraObject.rank", "LoraObject.init_from", "SweepObject.rank", "TrialObject.winner"} <= set(fields)
    assert fields["TrialObject.rank"]["type"] == "integer"
    assert fields["LoraObject.alpha"]["anyOf"][0] == {"type": "number"}
    assert {"const": "auto", "type": "string"} in fields["HyperparametersObject.n_epochs"]["anyOf"]
