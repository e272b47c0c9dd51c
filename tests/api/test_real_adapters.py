"""Adapters over HTTP with the real engine: what waits, what is damaged, what overflows, what has no room."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import safetensors.numpy

from tenora.config import Settings
from tenora.engine.client.client import AsyncEngine
from tenora.engine.core import Engine
from tenora.engine.messages import Event
from tests.api.conftest import Service, import_adapter, running
from tests.control.conftest import until_true
from tests.support.patience import PATIENCE
from tests.support.scripted_engine import Script

Make = Callable[..., Path]


class GatedEngine(Engine):
    """Takes no step while the gate is closed."""

    gate = threading.Event()

    def step(self) -> list[Event]:
        assert self.gate.wait(PATIENCE)
        return super().step()


@pytest.fixture
async def service(tmp_path: Path, script: Script, tiny_base: Path) -> AsyncIterator[Service]:
    """One slot, and a host cache that holds one adapter: all but the first one have to wait on the disk."""
    small = {"kv_cache_bytes": 2**22, "adapter_pool_bytes": 2**20, "max_adapters": 1, "host_cache_bytes": 0}
    settings = Settings(home=tmp_path / "home", device="cpu", dtype="float32", threads=1, **small)
    engine = AsyncEngine.in_thread(settings, lambda wake: GatedEngine.load(settings, tiny_base, wake=wake))
    GatedEngine.gate.set()
    async with running(settings, script, tiny_base, engine) as service:
        yield service
        GatedEngine.gate.set()


async def ask(client: httpx.AsyncClient, model: str, **fields: Any) -> httpx.Response:
    body = {"model": model, "prompt": "Define: fox.", "max_tokens": 2, "temperature": 0, "ignore_eos": True, **fields}
    return await client.post("/v1/completions", json=body)


async def test_requests_that_wait_for_a_slot_outlive_the_deletion_of_their_adapter(
    service: Service, make_adapter: Make
) -> None:
    adapters, infer = service.client("adapters"), service.client("infer")
    names = [f"a{seed}" for seed in range(4)]
    expected = {}
    for seed, name in enumerate(names):
        assert (await import_adapter(adapters, name, make_adapter(seed))).status_code == 201
        expected[name] = (await ask(infer, name)).json()["choices"][0]["text"]
    GatedEngine.gate.clear()
    waiting = {name: asyncio.create_task(ask(infer, name)) for name in names}
    await until_true(lambda: service.control.engine.open_requests == len(names))
    for name in names[:-1]:
        assert (await adapters.delete(f"/v1/adapters/{name}")).status_code == 200
        assert (await ask(infer, name)).status_code == 404
    GatedEngine.gate.set()
    for name, task in waiting.items():
        answer = await task
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected[name]
    await service.control._blobs.settle()
    assert len(service.control._blobs.store.list()) == 1


async def test_compositions_are_exact_wait_for_a_slot_and_outlive_the_deletion_of_a_part(
    service: Service, make_adapter: Make
) -> None:
    adapters, infer = service.client("adapters"), service.client("infer")
    base = service.control.inference.base_id
    digests = {}
    for seed, name in enumerate(("fox", "owl")):
        digests[name] = (await import_adapter(adapters, name, make_adapter(seed))).json()["digest"]

    async def choices(model: str, **fields: Any) -> Any:
        answer = await ask(infer, model, logprobs=3, **fields)
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"]

    assert await choices("fox", adapter_scale=0) == await choices(base)
    assert await choices("fox", adapter_scale=1) == await choices("fox") != await choices(base)
    both = {"adapters": [{"name": "fox", "weight": 0.75}, {"name": "owl", "weight": 0.5}]}
    alone = {"adapters": [{"name": "fox", "weight": 0.75}, {"name": "owl", "weight": 0}]}
    composed = await choices(base, **both)
    assert composed != await choices(base, **alone) == await choices("fox", adapter_scale=0.75)
    GatedEngine.gate.clear()
    waiting = asyncio.create_task(choices(base, **both))
    await until_true(lambda: service.control.engine.open_requests == 1)
    assert (await adapters.delete("/v1/adapters/fox")).status_code == 200
    assert (await ask(infer, base, **both)).status_code == 404
    GatedEngine.gate.set()
    assert await waiting == composed
    await service.control._blobs.settle()
    assert service.control._blobs.store.list() == (digests["owl"],)
    await choices("owl")  # a step, in which what was deleted goes
    await until_true(lambda: set(service.control.engine.stats.adapters_resident) == {digests["owl"]})


async def test_one_flipped_bit_is_an_error_that_is_not_repeated_and_nobody_elses(
    service: Service, make_adapter: Make
) -> None:
    adapters, infer = service.client("adapters"), service.client("infer")
    digest = (await import_adapter(adapters, "fox", make_adapter(1))).json()["digest"]
    await import_adapter(adapters, "owl", make_adapter(2))
    good = (await ask(infer, "fox")).json()["choices"]
    await ask(infer, "owl")  # takes the only slot
    path = service.control._blobs.store.path(digest) / "adapter_model.safetensors"
    path.chmod(0o600)
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    for call in (ask(infer, "fox"), ask(infer, "fox", stream=False), adapters.get("/v1/adapters/fox/download")):
        answer = await call
        assert (answer.status_code, answer.headers["x-should-retry"]) == (500, "false")
        assert answer.json()["error"]["code"] == "adapter_damaged"
        assert "retry-after" not in answer.headers
    assert (await ask(infer, "owl")).status_code == 200
    assert (await import_adapter(adapters, "fox", make_adapter(1))).json()["digest"] == digest
    assert (await ask(infer, "fox")).json()["choices"] == good


async def test_what_does_not_pass_by_itself_is_no_503(service: Service, make_adapter: Make) -> None:
    adapters, infer = service.client("adapters"), service.client("infer")
    directory = make_adapter(1)
    weights = directory / "adapter_model.safetensors"
    arrays = safetensors.numpy.load_file(weights)
    safetensors.numpy.save_file({name: value / abs(value) * 1e38 for name, value in arrays.items()}, weights)
    assert (await import_adapter(adapters, "huge", directory)).status_code == 201
    for fields in ({}, {"echo": True, "logprobs": 1, "max_tokens": 0}, {"stream": True}):
        answer = await ask(infer, "huge", **fields)
        assert answer.status_code == 422, answer.text
        error = answer.json()["error"]
        assert (error["code"], error["param"]) == ("adapter_overflow", "model")
    tiny = await ask(infer, service.control.inference.base_id, repetition_penalty=5e-324)
    assert (tiny.status_code, tiny.json()["error"]["param"]) == (400, "repetition_penalty")


async def test_a_pin_that_cannot_be_kept_is_a_conflict_and_is_not_stored(service: Service, make_adapter: Make) -> None:
    adapters = service.client("adapters")
    await import_adapter(adapters, "fox", make_adapter(1))
    pinned = await adapters.post("/v1/adapters/fox/pin")
    error = pinned.json()["error"]
    assert (pinned.status_code, error["code"], pinned.headers["x-should-retry"]) == (409, "pins_full", "false")
    assert "pins may take half of the 1 slots" in error["message"]
    assert not (await adapters.get("/v1/adapters/fox")).json()["pinned"]
    await import_adapter(service.client("adapters", tenant="other"), "owl", make_adapter(2))
    for tenant, name in (("default", "fox"), ("other", "owl")):
        assert (await ask(service.client("infer", tenant=tenant), name)).status_code == 200
