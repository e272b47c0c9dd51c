"""Adapters composed by a request: what is asked of the engine, what is refused, and whose adapters they may be."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from tenora.adapters.kinds import table
from tenora.adapters.ref import AdapterRef
from tests.api.conftest import Service, import_adapter

CHAT = "/v1/chat/completions"
HI = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TWO = [{"name": "fox", "weight": 0.75}, {"name": "owl", "weight": 0.5}]


@pytest.fixture
async def digests(service: Service, make_adapter: Callable[..., Path]) -> dict[str, str]:
    """Adapters fox and owl of the default tenant."""
    client = service.client("adapters")
    made = [await import_adapter(client, name, make_adapter(seed)) for seed, name in enumerate(("fox", "owl"))]
    return {answer.json()["name"]: answer.json()["digest"] for answer in made}


async def asked(service: Service, **fields: Any) -> AdapterRef | None:
    """The adapter that the engine was asked for."""
    service.script.requests.clear()
    answer = await service.client("infer").post(CHAT, json={**HI, **fields})
    assert answer.status_code == 200, answer.text
    (request,) = service.script.requests
    return request.adapter


def content(adapter: AdapterRef | None) -> tuple[Any, ...]:
    assert adapter is not None
    assert adapter.composition is not None
    made = adapter.composition
    weights = {part.digest: part.weight for part in made.parts}
    return weights, made.combination, made.density, made.majority_sign_method


async def test_adapters_are_composed_as_asked(service: Service, base_id: str, digests: dict[str, str]) -> None:
    fox, owl = digests["fox"], digests["owl"]
    both = {fox: 0.75, owl: 0.5}
    ties = {"adapters": TWO, "combination": "ties", "density": 0.25, "majority_sign_method": "frequency"}
    loraX = {
        "ids": ["fox", "owl"],
        "weights": [0.75, 0.5],
        "merge_strategy": "ties",
        "density": 0.25,
        "majority_sign_method": "frequency",
    }
    plain = await asked(service, adapters=TWO)
    assert content(plain) == (both, "cat", 1.0, "total")
    assert content(await asked(service, **ties)) == (both, "ties", 0.25, "frequency")
    assert await asked(service, **ties) == await asked(service, merged_adapters=loraX)
    assert content(await asked(service, adapters=TWO, combination="ties")) == (both, "ties", 0.5, "total")
    assert content(await asked(service, adapters=TWO, combination="dare_linear")) == (both, "dare_linear", 0.5, "total")
    for model in (base_id, "fox"):
        assert await asked(service, model=model, adapters=TWO) == plain
    assert await asked(service, adapters=[{"name": f"owl@{owl[:8]}", "weight": 0.5}, TWO[0]]) == plain
    assert content(await asked(service, adapters=TWO, adapter_scale=2))[0] == {fox: 1.5, owl: 1.0}


async def test_a_scale_of_0_is_the_base_and_of_1_the_adapter(service: Service, digests: dict[str, str]) -> None:
    assert await asked(service, model="fox", adapter_scale=0) is None
    assert await asked(service, adapters=TWO, combination="ties", adapter_scale=0) is None
    plain = await asked(service, model="fox")
    assert await asked(service, model="fox", adapter_scale=1) == plain
    assert await asked(service, adapter_id="fox", adapter_scale=1) == plain
    assert await asked(service, adapters=[{"name": "fox"}]) == plain
    half = await asked(service, model="fox", adapter_scale=0.5)
    assert content(half) == ({digests["fox"]: 0.5}, "cat", 1.0, "total")


async def test_usage_says_which_versions_answered(service: Service, digests: dict[str, str]) -> None:
    client = service.client("infer")
    used = [
        {"name": "fox", "digest": digests["fox"], "weight": 1.5},
        {"name": "owl", "digest": digests["owl"], "weight": 1.0},
    ]
    answer = (await client.post(CHAT, json={**HI, "adapters": TWO, "adapter_scale": 2})).json()
    assert (answer["model"], answer["usage"]["adapters"]) == ("fox+owl", used)
    body = {"prompt": "hi", "adapters": TWO, "adapter_scale": 2, "model": "fox", "max_tokens": 1}
    answer = (await client.post("/v1/completions", json=body)).json()
    assert (answer["model"], answer["usage"]["adapters"]) == ("fox", used)
    streamed = {**HI, "adapters": TWO, "stream": True, "stream_options": {"include_usage": True}}
    assert digests["owl"] in (await client.post(CHAT, json=streamed)).text
    assert "adapters" not in (await client.post(CHAT, json={**HI, "model": "fox"})).json()["usage"]


REFUSED: tuple[tuple[dict[str, Any], str], ...] = (
    ({"adapters": []}, "adapters"),
    ({"adapters": [{"name": f"a{number}"} for number in range(9)]}, "adapters"),
    ({"adapters": [{"name": "fox", "weight": 11}]}, "adapters[0].weight"),
    ({"adapters": [{"name": "fox", "weight": "NaN"}]}, "adapters[0].weight"),
    ({"adapters": [TWO[0], TWO[0]]}, "adapters"),
    ({"adapters": [TWO[0], {"name": "default/fox"}]}, "adapters"),
    ({"adapters": [TWO[0], {"name": "{base}"}]}, "adapters"),
    ({"adapters": TWO, "model": "default/fox"}, "model"),
    ({"adapters": TWO, "adapter_id": "fox"}, "adapter_id"),
    ({"adapters": TWO, "merged_adapters": {"ids": ["fox"], "weights": [1]}}, "merged_adapters"),
    ({"adapters": TWO, "combination": "slerp"}, "combination"),
    ({"adapters": TWO, "combination": "ties", "density": 0}, "density"),
    ({"adapters": TWO, "density": 0.5}, "density"),
    ({"adapters": TWO, "combination": "dare_linear", "majority_sign_method": "total"}, "majority_sign_method"),
    ({"model": "fox", "combination": "cat"}, "combination"),
    ({"model": "fox", "adapter_scale": 2.5}, "adapter_scale"),
    ({"model": "{base}", "adapter_scale": 1}, "adapter_scale"),
    ({"merged_adapters": {"ids": ["fox"], "weights": [1, 2]}}, "merged_adapters.weights"),
    ({"merged_adapters": {"ids": ["fox"], "weights": [1], "density": 0.5}}, "merged_adapters.density"),
)


async def test_what_cannot_be_composed_is_refused_by_name(
    service: Service, base_id: str, digests: dict[str, str]
) -> None:
    assert len(digests) == 2
    told = []
    for fields, _ in REFUSED:
        body = {**HI, **fields}
        text = httpx.Request("POST", "http://x", json=body).content.replace(b"{base}", base_id.encode())
        answer = await service.client("infer").post(CHAT, content=text, headers={"content-type": "application/json"})
        told.append((answer.status_code, answer.json()["error"]["param"]))
    assert told == [(400, param) for _, param in REFUSED]
    assert service.script.requests == []


async def test_only_ones_own_adapters_are_composed(
    service: Service, digests: dict[str, str], make_adapter: Callable[..., Path]
) -> None:
    other = service.client("admin", "other")
    await import_adapter(other, "bat", make_adapter(5))
    for field in ("adapters", "merged_adapters"):
        answers = []
        for name in ("fox", "nix", f"fox@{digests['fox']}", "default/fox"):
            body = {"adapters": [{"name": "bat"}, {"name": name}]}
            if field == "merged_adapters":
                body = {"merged_adapters": {"ids": ["bat", name], "weights": [1, 1]}}
            answer = await other.post(CHAT, json={**HI, **body})
            answers.append((answer.status_code, answer.text.replace(name, "?")))
        assert {status for status, _ in answers} == {404}
        assert len(set(answers)) == 1
    assert service.script.requests == []


async def test_ranks_are_bounded_before_any_work(
    service: Service, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert len(digests) == 2
    monkeypatch.setattr(service.control._blobs, "max_rank", 7)
    answer = await service.client("infer").post(CHAT, json={**HI, "adapters": TWO})
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "adapters_do_not_compose", "adapters")
    assert "8 together" in error["message"]
    assert service.script.requests == []


async def test_kinds_that_do_not_compose_are_refused(
    service: Service, digests: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs = service.control._blobs
    shape = await blobs.shape(digests["owl"])
    assert shape is not None
    assert shape.kind in table.COMPOSED
    blobs._shapes[digests["owl"]] = shape._replace(kind="prefix")
    for fields in ({"adapters": TWO}, {"model": "owl", "adapter_scale": 0.5}):
        answer = await service.client("infer").post(CHAT, json={**HI, **fields})
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "adapters_do_not_compose")
        assert "'owl' is of kind prefix" in answer.json()["error"]["message"]
    assert service.script.requests == []
    assert (await asked(service, model="owl", adapter_scale=1)) == await asked(service, model="owl")


async def test_a_part_in_use_stays_until_its_requests_have_ended(service: Service, digests: dict[str, str]) -> None:
    """The alias goes at once; files and what the engine holds of them go with the last request."""
    service.script.hold_after = 1
    store = service.control._blobs.store
    running = asyncio.create_task(service.client("infer").post(CHAT, json={**HI, "adapters": TWO}))
    await service.script.until(lambda: bool(service.script.requests))
    assert (await service.client("adapters").delete("/v1/adapters/fox")).status_code == 200
    assert store.exists(digests["fox"])
    gone = await service.client("infer").post(CHAT, json={**HI, "adapters": TWO})
    assert gone.status_code == 404
    service.script.hold_after = None
    assert (await running).status_code == 200
    await service.control._blobs.settle()
    assert not store.exists(digests["fox"])
    assert store.exists(digests["owl"])
