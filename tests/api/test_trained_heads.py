"""Heads that are trained with layers, over HTTP and the real engine on a tiny base: file → card → call → download."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import peft
import pytest
import torch
import transformers

from tenora.model.tokenizer import Tokenizer
from tests.api.conftest import Service, upload
from tests.api.test_head_jobs import HEAD, asked, labelled
from tests.api.test_publishing import finished
from tests.api.test_real_engine import base, service, settings

__all__ = ["base", "service", "settings"]  # fixtures

# PEFT and transformers disagree on a name that one of them deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
TEXT = "good day number 12"


async def unpacked(client: httpx.AsyncClient, name: str, directory: Path) -> Path:
    found = (await client.get(f"/v1/adapters/{name}/download")).content
    with zipfile.ZipFile(io.BytesIO(found)) as archive:
        archive.extractall(directory)
    return directory


@pytest.mark.parametrize("layers", ["lora", 1])
async def test_a_classifier_is_trained_measured_called_and_loaded_by_peft(
    service: Service, base_id: str, tiny_base: Path, tmp_path: Path, layers: str | int
) -> None:
    client = service.client()
    file = (await upload(client, labelled(60))).json()["id"]
    body = asked(file, base_id, train_layers=layers, hyperparameters={"n_epochs": 8, "learning_rate_multiplier": 6})
    estimate = (await client.post("/v1/fine_tuning/estimate", json=body)).json()
    assert estimate["steps"] > 0
    job = await finished(client, **body, name="mood", seed=1, lora={"rank": 4})
    assert job["status"] == "succeeded", job["error"]
    card = job["evaluation"]["head"]
    assert (card["labels"], card["rows"], card["folds"]) == (["maybe", "no", "yes"], 6, 0)
    assert card["accuracy"] == 1.0 > card["low"] > 0.5
    assert [one["name"] for one in card["beside"]] == ["most common", "tf-idf", "few-shot base"]
    assert job["evaluation"]["forgetting"] is None
    parity = job["evaluation"]["parity"]
    assert parity["modules"] == (21 if layers == "lora" else 7)
    assert parity["gap"] < parity["tolerance"]

    said = (await client.post("/classify", json={"model": "mood", "input": TEXT})).json()["data"][0]
    assert said["label"] == "yes"
    directory = await unpacked(client, "mood", tmp_path / "mood")
    config = json.loads((directory / "adapter_config.json").read_bytes())
    assert config.get("layers_to_transform") == (None if layers == "lora" else [2])
    model: Any = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_base, num_labels=3, dtype=torch.float32
    )
    reloaded = peft.PeftModelForSequenceClassification.from_pretrained(model, directory).eval()
    ids = torch.tensor([Tokenizer.load(tiny_base).encode(TEXT)])
    with torch.no_grad():
        theirs = reloaded(input_ids=ids).logits.softmax(dim=-1)[0]
    np.testing.assert_allclose(said["probs"], theirs.numpy(), atol=1e-4)


async def test_an_embedding_is_trained_on_pairs_and_served_by_its_adapters_name(service: Service, base_id: str) -> None:
    client = service.client()
    rows = [
        {"anchor": f"what is {i}{i}?", "positive": f"{i}{i} it is", "negatives": [f"{i + 1} no"]} for i in range(60)
    ]
    file = (await upload(client, "".join(json.dumps(row) + "\n" for row in rows))).json()["id"]
    body = asked(file, base_id, train_layers="lora", head={"type": "embedding"}, hyperparameters={"n_epochs": 2})
    job = await finished(client, **body, name="near", seed=1, lora={"rank": 4})
    assert job["status"] == "succeeded", job["error"]
    card = job["evaluation"]["head"]
    assert card["type"] == "embedding"
    assert card["metrics"].keys() >= {"recall_at_1", "recall_at_5", "recall_at_10"}
    assert card["low"] <= card["accuracy"] == card["metrics"]["recall_at_1"] <= card["high"]
    texts = ["what is 11?", "11 it is"]
    found = [
        (await client.post("/v1/embeddings", json={"model": model, "input": texts})).json()["data"]
        for model in ("near", base_id)
    ]
    ours, plain = (np.array([one["embedding"] for one in vectors]) for vectors in found)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1.0, atol=1e-5)
    assert ours.shape == plain.shape
    assert not np.allclose(ours, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("options", "param", "words"),
    [
        ({"train_layers": 2, "head": {"layer": -2}}, f"method.{HEAD}.head.layer", "reads the last one"),
        (
            {"train_layers": "lora", "hyperparameters": {"inverse_regularization": 1.0}},
            f"method.{HEAD}.hyperparameters.inverse_regularization",
            "weight_decay",
        ),
        ({"train_layers": "all"}, f"method.{HEAD}.train_layers", ""),
    ],
)
async def test_what_does_not_go_with_trained_layers_is_refused(
    service: Service, base_id: str, options: dict[str, Any], param: str, words: str
) -> None:
    client = service.client()
    file = (await upload(client, labelled(12))).json()["id"]
    answer = await client.post("/v1/fine_tuning/estimate", json=asked(file, base_id, **options))
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert words in error["message"]
