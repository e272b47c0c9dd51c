"""Adapters of every kind over HTTP and the real engine, all in one batch: as their libraries compute them."""

from __future__ import annotations

import asyncio
import io
import zipfile
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import peft
import pytest
import torch

from tenora.adapters.kinds.bottleneck import Bottleneck, bottleneck_files
from tenora.adapters.peft_format import write_files
from tenora.config import Settings
from tenora.engine.client.client import AsyncEngine
from tenora.engine.core import Engine
from tenora.model.loading import load_decoder
from tenora_kernels.flags import WITH_RESIDUAL
from tests.api.conftest import Service, import_adapter, running
from tests.model.adapterhub.record import HERE
from tests.model.served import base_model, our_logits, peft_logits, save_random
from tests.support.scripted_engine import Script

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:`is_gradient_checkpointing`:FutureWarning")

IDS = [int(token) for token in np.random.default_rng(4).integers(3, 384, 21)]
CAUSAL: Any = {"task_type": "CAUSAL_LM"}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
RANDOM = (".lora_", "ia3_", "lambda", "prompt_encoder")
CONFIGS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=4, target_modules=ATTENTION, **CAUSAL),
    "dora": lambda: peft.LoraConfig(r=4, target_modules=[*ATTENTION, "down_proj"], use_dora=True, **CAUSAL),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"], **CAUSAL
    ),
    "vera": lambda: peft.VeraConfig(r=8, target_modules=["q_proj", "v_proj"], save_projection=False, **CAUSAL),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=7, **CAUSAL),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=5, **CAUSAL),
}


@pytest.fixture(scope="module")
def saved(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    """A directory of each kind, as PEFT saves it."""
    found: dict[str, Path] = {}
    for kind, config in CONFIGS.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        save_random(tiny_base, config(), found[kind], lambda name: any(part in name for part in RANDOM))
    random = np.random.default_rng(2)
    shapes = {"down": (6, 48), "inner": (6,), "up": (48, 6), "outer": (48,)}
    bottlenecks = {
        f"model.layers.{layer}.mlp": Bottleneck(
            **{name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
        )
        for layer in range(3)
    }
    files = bottleneck_files("tiny", bottlenecks, flags=WITH_RESIDUAL, scaling=1.0, layers=3, family="llama")
    found["bottleneck"] = tmp_path_factory.mktemp("hub") / "bottleneck"
    write_files(found["bottleneck"], *files)
    return found


@pytest.fixture
def other_base(tmp_path: Path) -> Path:
    """Bottlenecks of a base of 32 columns."""
    for name, to in (("adapter_config.json",) * 2, ("adapter.safetensors", "adapter_model.safetensors")):
        (tmp_path / to).write_bytes((HERE / "houlsby" / name).read_bytes())
    return tmp_path


@pytest.fixture
async def service(tmp_path: Path, script: Script, tiny_base: Path) -> AsyncIterator[Service]:
    small = {"kv_cache_bytes": 2**24, "adapter_pool_bytes": 2**24, "max_adapters": 8}
    settings = Settings(home=tmp_path / "home", device="cpu", dtype="float32", threads=1, **small)
    engine = AsyncEngine.in_thread(settings, lambda wake: Engine.load(settings, tiny_base, wake=wake))
    async with running(settings, script, tiny_base, engine) as service:
        yield service


async def scores(client: httpx.AsyncClient, model: str) -> list[float]:
    """Log-probabilities of IDS[1:]."""
    body = {"model": model, "prompt": IDS, "max_tokens": 0, "echo": True, "logprobs": 0, "temperature": 0}
    answer = await client.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]["token_logprobs"][1:]


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    """Of IDS[1:], from the scores of the positions of IDS."""
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(IDS[1:])[:, None])[:, 0]


@pytest.mark.full
async def test_kinds_share_a_batch_and_each_one_is_what_peft_computes_and_goes_out_as_it_came(
    service: Service, saved: Mapping[str, Path], tiny_base: Path, other_base: Path
) -> None:
    adapters, infer = service.client("adapters"), service.client("infer")
    for kind, directory in saved.items():
        made = await import_adapter(adapters, kind, directory)
        assert made.status_code == 201, made.text
        assert made.json()["method"] == kind
    refused = await import_adapter(adapters, "hub", other_base)
    assert refused.status_code == 422
    assert refused.json()["error"]["message"].startswith("hidden_size is 32, and this base has 48")
    base = service.control.inference.base_id
    together = await asyncio.gather(*(scores(infer, name) for name in (*saved, base)))
    found = dict(zip((*saved, base), together, strict=True))
    for kind, directory in saved.items():
        ids = torch.tensor(IDS)
        if kind == "bottleneck":  # held against AdapterHub's library in tests/model/test_bottlenecks.py
            wanted = log_probabilities(our_logits(load_decoder(tiny_base), directory, ids))
        else:
            wanted = log_probabilities(peft_logits(tiny_base, directory, ids))
        torch.testing.assert_close(torch.tensor(found[kind]), wanted, rtol=0, atol=2e-4)
        assert float((torch.tensor(found[kind]) - torch.tensor(found[base])).abs().max()) > 0.05
        packed = await adapters.get(f"/v1/adapters/{kind}/download")
        with zipfile.ZipFile(io.BytesIO(packed.content)) as archive:
            same = (directory / "adapter_model.safetensors").read_bytes()
            name = "adapter.safetensors" if kind == "bottleneck" else "adapter_model.safetensors"
            assert archive.read(name) == same
    with torch.no_grad():
        plain = log_probabilities(base_model(tiny_base)(torch.tensor(IDS)[None]).logits[0])
    torch.testing.assert_close(torch.tensor(found[base]), plain, rtol=0, atol=2e-4)
