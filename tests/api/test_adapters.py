"""/v1/adapters, /v1/models, and vLLM's two calls."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tenora.adapters import matching
from tenora.api.schemas.adapters import RollbackRequest
from tenora.config import Settings
from tests.api.conftest import Service, import_adapter

MakeAdapter = Callable[..., Path]


async def test_life_of_an_adapter(service: Service, base_id: str, make_adapter: MakeAdapter) -> None:
    client = service.client("adapters")
    response = await import_adapter(client, "fox", make_adapter(1))
    assert response.status_code == 201, response.text
    adapter = response.json()
    expected = {
        "object": "adapter",
        "name": "fox",
        "tenant": "default",
        "version": 1,
        "base_model": base_id,
        "method": "lora",
        "rank": 4,
        "source": "upload",
        "job_id": None,
        "pinned": False,
        "evaluation": None,
        "resident": "disk",
    }
    assert {name: adapter[name] for name in expected} == expected
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]
    second = (await import_adapter(client, "fox", make_adapter(2))).json()
    assert (second["version"], second["digest"] != adapter["digest"]) == (2, True)
    for name in ("fox", "default%2Ffox", "default/fox"):
        assert (await client.get(f"/v1/adapters/{name}")).json()["digest"] == second["digest"]
        versions = (await client.get(f"/v1/adapters/{name}/versions")).json()["data"]
        assert [entry["version"] for entry in versions] == [2, 1]
    rolled = await client.post("/v1/adapters/fox/rollback", json={"version": 1})
    assert rolled.json()["digest"] == adapter["digest"]
    by_digest = await client.post("/v1/adapters/fox/rollback", json={"version": second["digest"][:12]})
    assert by_digest.json()["version"] == 2
    for wrong in (True, 1.5, None, [1]):
        refused = await client.post("/v1/adapters/fox/rollback", json={"version": wrong})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "version")
    assert RollbackRequest(version="12345678").version == "12345678"  # a digest may begin with digits alone
    assert (await client.post("/v1/adapters/fox/pin")).json()["pinned"] is True
    assert (await client.post("/v1/adapters/fox/unpin")).json()["pinned"] is False
    assert [entry["name"] for entry in (await client.get("/v1/adapters")).json()["data"]] == ["fox"]
    deleted = await client.delete("/v1/adapters/fox")
    assert deleted.json() == {"id": "fox", "object": "adapter", "deleted": True}
    assert (await client.get("/v1/adapters/fox")).status_code == 404


async def test_download_is_a_peft_directory_and_leaves_nothing(service: Service, make_adapter: MakeAdapter) -> None:
    client = service.client("adapters")
    directory = make_adapter(1)
    await import_adapter(client, "fox", directory)
    response = await client.get("/v1/adapters/fox/download")
    assert response.headers["content-type"] == "application/zip"
    assert 'filename="fox.zip"' in response.headers["content-disposition"]
    archive = zipfile.ZipFile(io.BytesIO(response.content))
    names = {Path(name).name for name in archive.namelist()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    [weights] = [name for name in archive.namelist() if name.endswith(".safetensors")]
    assert archive.read(weights) == (directory / "adapter_model.safetensors").read_bytes()
    assert service.staged() == []


async def test_malformed_adapters_are_422_and_change_nothing(service: Service, make_adapter: MakeAdapter) -> None:
    client = service.client("adapters")
    directory = make_adapter(1)
    (directory / "adapter_model.safetensors").write_bytes(b"not safetensors at all")
    response = await import_adapter(client, "fox", directory)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_adapter")
    assert (await client.get("/v1/adapters")).json()["data"] == []
    assert service.staged() == []


async def test_thousands_of_patterns_are_refused_unread_and_as_many_plain_names_are_read(
    service: Service, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[str] = []
    real = matching.Pattern
    monkeypatch.setattr(matching, "Pattern", lambda text, **how: compiled.append(text) or real(text, **how))
    client, directory = service.client("adapters"), make_adapter(1)
    path = directory / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "rank_pattern": {f"(q{'_' * 30}|{i})*": 4 for i in range(2000)}}))
    refused = await import_adapter(client, "fox", directory)
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "invalid_adapter")
    assert "list the module names instead" in refused.json()["error"]["message"]
    assert 0 < len(compiled) <= matching.MAX_EXPRESSIONS
    compiled.clear()
    path.write_text(json.dumps({**config, "rank_pattern": {f"layers.{i}.q_proj": 4 for i in range(2000)}}))
    assert (await import_adapter(client, "fox", directory)).status_code == 201
    assert compiled == []


@pytest.mark.parametrize("name", ["", "a/b", "Föx", "..", "x" * 64, "a b", "-a", "a\x00"])
async def test_bad_names(service: Service, make_adapter: MakeAdapter, name: str) -> None:
    response = await import_adapter(service.client("adapters"), name, make_adapter(1))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")


async def test_an_adapter_may_not_take_the_bases_name(
    service: Service, base_id: str, make_adapter: MakeAdapter
) -> None:
    response = await import_adapter(service.client("adapters"), base_id, make_adapter(1))
    assert response.status_code == 400


async def test_names_may_have_capitals_which_tell_adapters_apart(
    service: Service, base_id: str, make_adapter: MakeAdapter
) -> None:
    client, infer = service.client("adapters"), service.client("infer")
    made = {
        name: (await import_adapter(client, name, make_adapter(seed))).json()["digest"]
        for seed, name in enumerate(("SupportBot_V2.1", "supportbot_v2.1"))
    }
    assert len(set(made.values())) == 2
    for name, digest in made.items():
        for path in (name, f"default/{name}"):
            assert (await client.get(f"/v1/adapters/{path}")).json()["digest"] == digest
        for model in (name, f"default/{name}", f"{name}@{digest[:8]}"):
            answer = await infer.post("/v1/completions", json={"model": model, "prompt": "x", "max_tokens": 1})
            assert (answer.status_code, answer.json()["model"]) == (200, model)
    assert set(made) <= {model["id"] for model in (await infer.get("/v1/models")).json()["data"]}
    assert (await infer.post("/v1/completions", json={"model": "SUPPORTBOT_V2.1", "prompt": "x"})).status_code == 404
    assert (await import_adapter(client, base_id.upper(), make_adapter(1))).status_code == 400


async def test_import_once(service: Service, make_adapter: MakeAdapter) -> None:
    client = service.client("adapters")
    client.headers["idempotency-key"] = "import-1"
    first = await import_adapter(client, "fox", make_adapter(1))
    again = await import_adapter(client, "fox", make_adapter(1))
    assert (first.status_code, again.status_code) == (201, 201)
    assert first.content == again.content
    assert (await import_adapter(client, "fox", make_adapter(2))).status_code == 422


async def test_models(service: Service, base_id: str, make_adapter: MakeAdapter) -> None:
    client = service.client("infer")
    await import_adapter(service.client("adapters"), "fox", make_adapter(1))
    cards = (await client.get("/v1/models")).json()["data"]
    assert [(card["id"], card["parent"]) for card in cards] == [(base_id, None), ("fox", base_id)]
    assert set(cards[0]) == {"id", "object", "created", "owned_by", "root", "parent", "max_model_len"}
    for name in (base_id, "fox", "default%2Ffox", "default/fox"):
        assert (await client.get(f"/v1/models/{name}")).status_code == 200
    missing = await client.get("/v1/models/cat")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    admin = service.client("adapters")
    assert (await admin.delete(f"/v1/models/{base_id}")).status_code == 403
    assert (await admin.delete("/v1/models/default%2Ffox")).json()["deleted"] is True
    assert (await client.get("/v1/models/fox")).status_code == 404


async def test_the_answer_echoes_the_name_that_was_asked_for(
    service: Service, base_id: str, make_adapter: MakeAdapter
) -> None:
    adapter = (await import_adapter(service.client("adapters"), "fox", make_adapter(1))).json()
    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    client = service.client("infer")
    names = {"fox", "default/fox", f"fox@{adapter['digest'][:8]}"}
    for name in names:
        answer = (await client.post("/v1/chat/completions", json={**body, "model": name})).json()
        assert answer["model"] == name
        by_id = (await client.post("/v1/chat/completions", json={**body, "model": base_id, "adapter_id": name})).json()
        assert by_id["model"] == base_id
    assert {request.adapter.digest for request in service.script.requests if request.adapter} == {adapter["digest"]}
    assert len(service.script.requests) == 2 * len(names)


class TestVllm:
    @pytest.fixture
    def settings(self, tmp_path: Path) -> Settings:
        return Settings(home=tmp_path / "home", device="cpu", dtype="float32", adapter_dirs=(tmp_path,), threads=1)

    async def test_load_and_unload(self, service: Service, make_adapter: MakeAdapter) -> None:
        client = service.client("admin")
        body = {"lora_name": "fox", "lora_path": str(make_adapter(1))}
        loaded = await client.post("/v1/load_lora_adapter", json=body)
        assert (loaded.status_code, loaded.text) == (200, "Success: LoRA adapter 'fox' added successfully.")
        assert loaded.headers["content-type"].startswith("text/plain")
        again = await client.post("/v1/load_lora_adapter", json=body)
        assert (again.status_code, again.json()["error"]["type"]) == (400, "InvalidUserInput")
        replaced = await client.post("/v1/load_lora_adapter", json={**body, "load_inplace": True})
        assert replaced.status_code == 200
        removed = await client.post("/v1/unload_lora_adapter", json={"lora_name": "fox"})
        assert (removed.status_code, removed.text) == (200, "Success: LoRA adapter 'fox' removed successfully.")
        gone = await client.post("/v1/unload_lora_adapter", json={"lora_name": "fox"})
        assert gone.status_code == 404

    @pytest.mark.parametrize("call", ["load", "unload"])
    async def test_empty_fields(self, service: Service, call: str) -> None:
        body = {"lora_name": ""} | ({"lora_path": ""} if call == "load" else {})
        response = await service.client("admin").post(
            f"/v1/{call}_lora_adapter", content=json.dumps(body), headers={"content-type": "application/json"}
        )
        assert (response.status_code, response.json()["error"]["type"]) == (400, "InvalidUserInput")

    @pytest.mark.parametrize("path", ["/etc", "relative", "../../etc", "\x00", "/proc/self"])
    async def test_paths_elsewhere_are_403(self, service: Service, path: str) -> None:
        body = {"lora_name": "fox", "lora_path": path}
        assert (await service.client("admin").post("/v1/load_lora_adapter", json=body)).status_code == 403

    async def test_only_admins_name_paths(self, service: Service, make_adapter: MakeAdapter) -> None:
        body = {"lora_name": "fox", "lora_path": str(make_adapter(1))}
        assert (await service.client("adapters").post("/v1/load_lora_adapter", json=body)).status_code == 403

    async def test_the_operators_directories_are_the_default_tenants_alone(
        self, service: Service, make_adapter: MakeAdapter
    ) -> None:
        directory = make_adapter(1)
        answers = [
            await service.client("admin", "other").post(
                "/v1/load_lora_adapter", json={"lora_name": "fox", "lora_path": path}
            )
            for path in (str(directory), "/nowhere")
        ]
        assert {answer.status_code for answer in answers} == {403}
        assert answers[0].json() == answers[1].json()
        assert (await service.client("admin", "other").get("/v1/adapters")).json()["data"] == []
