"""Heads on the frozen base, over HTTP and the real engine on a tiny base: from a file to a card and a download."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors import safe_open

from tests.api.conftest import Service, upload
from tests.api.test_publishing import finished
from tests.api.test_real_engine import base, service, settings

__all__ = ["base", "service", "settings"]  # fixtures

HEAD = "feature_extraction"


def labelled(count: int, **last: Any) -> str:
    """Rows whose first word tells the label, mostly."""
    words = {"yes": "good", "no": "bad", "maybe": "fair"}
    names = ["yes", "no", "yes", "maybe", "yes", "no"]
    rows = [{"text": f"{words[names[i % 6]]} day number {i * 7919 % 997}", "label": names[i % 6]} for i in range(count)]
    return "".join(json.dumps(row) + "\n" for row in [*rows, *([last] if last else [])])


def asked(file: str, base_id: str, **options: Any) -> dict[str, Any]:
    return {"model": base_id, "training_file": file, "method": {"type": HEAD, HEAD: options}}


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
async def test_labels_become_a_head_that_is_published_with_its_card_and_downloaded(
    service: Service, base_id: str, tiny_base: Path, tmp_path: Path
) -> None:
    client = service.client()
    file = (await upload(client, labelled(60))).json()
    assert file["status"] == "processed", file
    estimate = (await client.post("/v1/fine_tuning/estimate", json=asked(file["id"], base_id))).json()
    assert (estimate["rows"], estimate["held_out_rows"]) == (54, 6)
    assert (estimate["steps"], estimate["evaluations"], estimate["read_tokens"]) == (0, 1, 0)
    job = await finished(client, **asked(file["id"], base_id, head={"name": "mood"}), name="mood", seed=1)
    assert job["status"] == "succeeded", job["error"]
    assert job["method"][HEAD]["head"] == {
        "type": "classification", "name": "mood", "multi_label": False, "labels": [], "dims": 0,
    }  # fmt: skip
    card = job["evaluation"]["head"]
    assert (card["labels"], card["rows"], card["folds"]) == (["maybe", "no", "yes"], 6, 5)
    assert card["accuracy"] == 1.0 > card["low"] > 0.5
    assert sum(map(sum, card["confusion"])) == 6
    beside = {one["name"]: one for one in card["beside"]}
    assert list(beside) == ["most common", "tf-idf", "few-shot base"]
    assert beside["most common"]["other"] == 0.5
    assert beside["few-shot base"]["rows"] == 6
    assert job["evaluation"]["verdicts"]["start"]["verdict"] == "better"
    parity = job["evaluation"]["parity"]
    assert (parity["rows"], parity["modules"]) == (4, 0)
    assert parity["gap"] < parity["tolerance"]
    events = (await client.get(f"/v1/fine_tuning/jobs/{job['id']}/events", params={"limit": 100})).json()["data"]
    assert any(event["message"] == "Rows read: 60 of 60" for event in events)

    found = (await client.get("/v1/adapters/mood/download")).content
    with zipfile.ZipFile(io.BytesIO(found)) as archive:
        archive.extractall(tmp_path / "mood")
    readme = (tmp_path / "mood" / "README.md").read_text("utf-8")
    assert "Accuracy on 6 held-out rows, 95% interval | 100.0%" in readme
    assert "| most common | 6 | accuracy |" in readme
    with safe_open(tmp_path / "mood" / "adapter_model.safetensors", "np") as file_:
        (head,) = json.loads(file_.metadata()["tenora_heads"])
        assert (head["name"], head["labels"]) == ("mood", ["maybe", "no", "yes"])
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    ids = torch.tensor([[5, 6, 7, 8]])
    before = model(ids).logits
    reloaded = peft.PeftModel.from_pretrained(model, tmp_path / "mood")
    assert torch.equal(reloaded(ids).logits, before)  # PEFT takes it, and it changes nothing of the base


async def test_a_better_head_takes_the_name_over_and_a_worse_one_does_not(service: Service, base_id: str) -> None:
    client = service.client()
    file = (await upload(client, labelled(60))).json()["id"]
    weak = {"hyperparameters": {"inverse_regularization": 1e-9}, "head": {"layer": -1, "pooling": "last"}}
    first = await finished(client, **asked(file, base_id, **weak), name="mood", seed=1)
    better = await finished(client, **asked(file, base_id), name="mood", seed=1)
    worse = await finished(client, **asked(file, base_id, **weak), name="mood", seed=1)
    moved = [job["published"]["alias_moved"] for job in (first, better, worse)]
    assert moved == [True, True, False], [job["published"] for job in (first, better, worse)]


@pytest.mark.parametrize("kind", ["regression", "scalar"])
async def test_numbers_are_learned_in_their_own_units(service: Service, base_id: str, kind: str) -> None:
    client = service.client()
    rows = [{"text": "ha " * (i % 5 + 1) + f"{i * 7919 % 997}", "label": 100.0 + 10 * (i % 5) + 0.5} for i in range(60)]
    file = (await upload(client, "".join(json.dumps(row) + "\n" for row in rows))).json()["id"]
    job = await finished(client, **asked(file, base_id, head={"type": kind}), name="score", seed=1)
    assert job["status"] == "succeeded", job["error"]
    card = job["evaluation"]["head"]
    assert (card["accuracy"], card["confusion"], card["labels"]) == (None, None, [])
    assert card["metrics"]["r2"] > 0.8
    assert card["metrics"]["mean_absolute_error"] < 6
    beside = {one["name"]: one for one in card["beside"]}
    assert beside["most common"]["measure"] == "squared error"
    assert beside["most common"]["verdict"] == "better"


async def test_any_number_of_classes(service: Service, base_id: str) -> None:
    client = service.client()
    words = {"warm": "sun", "wet": "rain"}
    sets = [["warm"], ["wet"], ["warm", "wet"], ["none"]]
    said = [" ".join(words.get(label, "fog") for label in sets[i % 4]) for i in range(60)]
    rows = [{"text": f"{text} {i * 7919 % 997}", "label": sets[i % 4]} for i, text in enumerate(said)]
    file = (await upload(client, "".join(json.dumps(row) + "\n" for row in rows))).json()["id"]
    job = await finished(client, **asked(file, base_id, head={"multi_label": True}), name="sky", seed=1)
    assert job["status"] == "succeeded", job["error"]
    card = job["evaluation"]["head"]
    assert (card["labels"], card["confusion"]) == (["none", "warm", "wet"], None)
    assert card["metrics"]["macro_f1"] > 0.6


@pytest.mark.parametrize(
    ("rows", "options", "param", "words"),
    [
        ('{"text": "a", "label": "x"}\n' * 8, {}, "training_file", "Every row, from line 1 on, has the label"),
        (labelled(12), {"head": {"type": "regression"}}, "training_file", "are no numbers"),
        (labelled(12), {"head": {"multi_label": True}}, "training_file", "is no list"),
        (labelled(12), {"head": {"labels": ["yes", "no"]}}, "training_file", "of lines 4, 10 is not in head.labels"),
        (labelled(12), {"head": {"labels": ["yes", "yes"]}}, f"method.{HEAD}.head.labels", "each once"),
        (labelled(12), {"head": {"dims": 8}}, f"method.{HEAD}.head.dims", "embedding"),
        (labelled(12), {"head": {"layer": 0}}, f"method.{HEAD}.head.layer", ""),
        (labelled(12), {"head": {"colour": 1}}, f"method.{HEAD}.head.colour", ""),
        (labelled(12), {"head": {"type": "embedding"}}, f"method.{HEAD}.train_layers", "learns by gradient"),
        (labelled(12), {"hyperparameters": {"n_epochs": 3}}, "n_epochs", "would change nothing"),
    ],
)  # fmt: skip
async def test_what_cannot_be_learned_is_refused_before_it_costs_anything(
    service: Service, base_id: str, rows: str, options: dict[str, Any], param: str, words: str
) -> None:
    client = service.client()
    file = (await upload(client, rows)).json()["id"]
    answer = await client.post("/v1/fine_tuning/estimate", json=asked(file, base_id, **options))
    error = answer.json()["error"]
    status = 422 if param == "training_file" else 400  # as of any file whose rows cannot be used
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]


async def test_a_label_that_training_has_not_seen_is_refused_with_its_line(service: Service, base_id: str) -> None:
    client = service.client()
    files = [(await upload(client, rows)).json()["id"] for rows in (labelled(12), labelled(6, text="a", label="ho"))]
    body = {**asked(files[0], base_id), "validation_file": files[1]}
    error = (await client.post("/v1/fine_tuning/estimate", json=body)).json()["error"]
    assert error["param"] == "validation_file"
    assert "The label 'ho' of line 7 is in no training row" in error["message"]
    made = (await client.post("/v1/fine_tuning/jobs", json={**asked(files[0], base_id), "lora": {"rank": 4}})).json()
    assert made["error"]["param"] == "lora.rank"


def test_the_interval_of_a_share_is_wilsons() -> None:
    from tenora.control.gate.head_card import wilson

    np.testing.assert_allclose(wilson(9, 10), (0.5958, 0.9821), atol=1e-4)
    assert wilson(0, 10)[0] == 0.0
    assert wilson(10, 10)[1] == pytest.approx(1.0)
