"""Heads and hidden states over HTTP and the real engine on a tiny base, as PEFT and transformers have them."""

from __future__ import annotations

import base64
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers

from tenora.adapters.head_files import HeadTensors
from tenora.adapters.heads import Head
from tenora.adapters.peft_format import write_adapter
from tenora.config import Settings
from tenora.engine.client.client import AsyncEngine
from tenora.engine.core import Engine
from tenora.model.spec import ModelSpec, target_modules
from tenora.training.spec import LoraSpec
from tests.api.conftest import Service, import_adapter, running
from tests.engine.driver import peft_warnings
from tests.support.scripted_engine import Script
from tests.support.scripted_jobs import random_modules

TEXTS = ["The quick brown fox.", "A small set of weights that turns one base into many.", "0123"]
pytestmark = pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning")


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    small = {"kv_cache_bytes": 2**24, "adapter_pool_bytes": 2**24, "max_adapters": 4, "max_num_batched_tokens": 16}
    return Settings(home=tmp_path / "home", device="cpu", dtype="float32", threads=1, **small)


@pytest.fixture
async def service(settings: Settings, script: Script, tiny_base: Path) -> AsyncIterator[Service]:
    engine = AsyncEngine.in_thread(settings, lambda wake: Engine.load(settings, tiny_base, wake=wake))
    async with running(settings, script, tiny_base, engine) as service:
        yield service


async def ask(service: Service, path: str, **body: Any) -> Any:
    response = await service.client("infer").post(path, json={"model": service.control.inference.base_id, **body})
    assert response.status_code == 200, response.text
    return response.json()


def states(model: Any, service: Service, text: str, layer: int, pooling: str) -> np.ndarray:
    ids = service.control.inference.tokenizer.encode(text, add_special_tokens=True)
    with torch.no_grad():
        found = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer][0]
    return (found[-1] if pooling == "last" else found.mean(0)).numpy()


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_hidden_states_of_the_base_are_those_of_transformers(
    service: Service, tiny_base: Path, pooling: str
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float32)
    for layer in (-1, -2, -3, -4):
        answer = await ask(service, "/pooling", input=TEXTS, layer=layer, pooling=pooling, encoding_format="base64")
        for text, item in zip(TEXTS, answer["data"], strict=True):
            wanted = states(model, service, text, layer, pooling)
            found = np.frombuffer(base64.b64decode(item["data"]), "<f4")
            np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())
    embedded = await ask(service, "/v1/embeddings", input=TEXTS)
    for text, item in zip(TEXTS, embedded["data"], strict=True):
        wanted = states(model, service, text, -1, "mean")
        np.testing.assert_allclose(item["embedding"], wanted / np.linalg.norm(wanted), atol=1e-5)


async def test_a_classifier_of_peft_classifies_as_there(service: Service, tiny_base: Path, tmp_path: Path) -> None:
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny_base, num_labels=3, dtype=torch.float32)
    config = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    with peft_warnings():
        model = peft.get_peft_model(base, config)
        torch.nn.init.normal_(model.base_model.model.score.modules_to_save["default"].weight)
        model.save_pretrained(tmp_path / "classifier")
    assert (await import_adapter(service.client("adapters"), "moods", tmp_path / "classifier")).status_code == 201
    answer = await ask(service, "/classify", model="moods", input=TEXTS)
    assert answer["labels"] == ["LABEL_0", "LABEL_1", "LABEL_2"]
    for text, item in zip(TEXTS, answer["data"], strict=True):
        ids = service.control.inference.tokenizer.encode(text, add_special_tokens=True)
        with torch.no_grad():
            wanted = model(torch.tensor([ids])).logits[0].softmax(-1)
        assert item["probs"] == pytest.approx(wanted.tolist(), abs=1e-5)
        assert item["label"] == f"LABEL_{int(wanted.argmax())}"


async def test_several_heads_of_one_adapter_are_read_each_as_it_says(
    service: Service, tiny_base: Path, tmp_path: Path, many_headed: Callable[..., Sequence[Head]]
) -> None:
    """Beside a request that generates with the same adapter; scores are the float64 products of its own states."""
    heads, weight, bias = many_headed(tmp_path / "many")
    assert (await import_adapter(service.client("adapters"), "many", tmp_path / "many")).status_code == 201
    for head in heads:
        scored = await ask(service, "/pooling", model="many", input=TEXTS, head=head.name)
        read = await ask(service, "/pooling", model="many", input=TEXTS, layer=head.layer, pooling=head.pooling)
        for scores, state in zip(scored["data"], read["data"], strict=True):
            wanted = weight[head.start : head.stop].astype(float) @ np.array(state["data"])
            wanted = wanted + bias[head.start : head.stop, 0]
            if head.kind == "regression":
                wanted = wanted * head.std + head.mean
            np.testing.assert_allclose(scores["data"], wanted, rtol=1e-5, atol=1e-5)
    vector = (await ask(service, "/v1/embeddings", model="many", input=TEXTS[0]))["data"][0]["embedding"]
    assert np.linalg.norm(vector) == pytest.approx(1)
    talk = [{"role": "user", "content": "Hi"}]
    answers = {"prompt": talk, "completions": ["Hello.", "Go away."]}
    rewards = await ask(service, "/v1/rewards", model="many", input=answers)
    whole = [*talk, {"role": "assistant", "content": "Go away."}]
    alone = await ask(service, "/pooling", model="many", messages=whole, head="reward")
    assert rewards["data"][1]["score"] == alone["data"][0]["data"][0]
    assert rewards["data"][1]["normalized"] == pytest.approx((rewards["data"][1]["score"] - 0.5) / 2)
    spoken = await ask(service, "/v1/chat/completions", model="many", messages=talk, max_tokens=3)
    assert spoken["usage"]["completion_tokens"] == 3


@pytest.fixture
def many_headed(tiny_base: Path) -> Callable[[Path], Any]:
    """`many_headed(directory)` writes a LoRA adapter with four heads: they, their weights and their biases."""
    spec = ModelSpec.from_directory(tiny_base)

    def write(directory: Path) -> Any:
        heads = (
            Head(name="topic", kind="classification", start=0, stop=3, labels=("a", "b", "c"), pooling="mean"),
            Head(name="price", kind="regression", start=3, stop=4, layer=-2, mean=10.0, std=3.0, bias=True),
            Head(name="reward", kind="scalar", start=4, stop=5, mean=0.5, std=2.0),
            Head(name="vector", kind="embedding", start=5, stop=9, layer=-3, pooling="mean"),
        )
        weight = np.random.default_rng(0).normal(size=(9, spec.hidden_size)).astype(np.float32)
        bias = np.zeros((9, 1), np.float32)
        bias[3] = 2.5
        shape = LoraSpec(rank=4, alpha=8.0, target_modules=("q_proj", "v_proj"))
        modules = random_modules(target_modules(spec), shape.target_modules, shape.rank, 0)
        write_adapter(directory, base_model="tiny", lora=shape, modules=modules, heads=HeadTensors(heads, weight, bias))
        return heads, weight, bias

    return write
