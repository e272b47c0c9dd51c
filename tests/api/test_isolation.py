"""Another tenant's anything is a 404, to the byte what a missing one is: every route, read off the OpenAPI document."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.api.conftest import Service, import_adapter, upload
from tests.api.test_auth import operations

BODIES: dict[str, Any] = {
    "/v1/adapters/{name}/rollback": {"version": 1},
    "/v1/unload_lora_adapter": {"lora_name": "{name}"},
    "/v1/chat/completions": {"model": "{model}", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1},
    "/v1/completions": {"model": "{model}", "prompt": "hi", "max_tokens": 1},
    "/v1/embeddings": {"model": "{model}", "input": "hi"},
    "/classify": {"model": "{model}", "input": "hi"},
    "/pooling": {"model": "{model}", "input": "hi"},
    "/v1/rewards": {"model": "{model}", "input": [{"role": "user", "content": "hi"}]},
    "/v1/fine_tuning/jobs": {"model": "{base}", "training_file": "{file_id}"},
    "/v1/fine_tuning/estimate": {"model": "{base}", "training_file": "{file_id}"},
}


async def call(client: httpx.AsyncClient, method: str, path: str, ids: dict[str, str]) -> tuple[int, bytes, list[str]]:
    """Status, body and header names; the ids in the body are made alike."""

    def fill(text: str) -> str:
        return re.sub(r"\{(\w+)\}", lambda match: ids[match[1]], text)

    content, headers = None, {}
    if method == "POST" and path in BODIES:
        # Only strings that name something are filled: the braces of JSON are not.
        content = json.dumps({key: fill(v) if isinstance(v, str) else v for key, v in BODIES[path].items()})
        headers = {"content-type": "application/json"}
    response = await client.request(method, fill(path), content=content, headers=headers)
    body = response.content
    for name, value in ids.items():
        if name != "base":
            body = body.replace(value.encode(), b"<" + name.encode() + b">")
    return response.status_code, body, sorted(response.headers)


async def test_a_foreign_key_sees_nothing(service: Service, base_id: str, make_adapter: Callable[..., Path]) -> None:
    owner, stranger = service.client("admin"), service.client("admin", "other")
    assert (await import_adapter(owner, "fox", make_adapter())).status_code == 201
    file_id = (await upload(owner)).json()["id"]
    job = await owner.post("/v1/fine_tuning/jobs", json={"model": base_id, "training_file": file_id, "name": "owl"})
    assert job.status_code == 200, job.text
    theirs = {"name": "fox", "model": "fox", "file_id": file_id, "job_id": job.json()["id"], "base": base_id}
    missing = {
        "name": "cat",
        "model": "cat",
        "file_id": file_id[:-4] + "zzzz",
        "job_id": theirs["job_id"][:-4] + "zzzz",
        "base": base_id,
    }
    checked = 0
    for method, path in operations(service):
        if path.startswith("/v1/admin/"):
            continue  # no tenant's key gets that far: tests/api/test_admin.py
        if "{" not in path and (method != "POST" or path not in BODIES):
            continue
        foreign = await call(stranger, method, path, theirs)
        absent = await call(stranger, method, path, missing)
        assert foreign == absent, (method, path)
        assert foreign[0] == 404, (method, path, foreign)
        checked += 1
    assert checked >= 26
    # All of it is still there, and the owner's key opens it: the test above could have failed.
    for path in (
        f"/v1/files/{file_id}",
        "/v1/adapters/fox",
        "/v1/models/fox",
        f"/v1/fine_tuning/jobs/{theirs['job_id']}",
    ):
        assert (await owner.get(path)).status_code == 200, path


async def test_listings_show_ones_own_only(service: Service, make_adapter: Callable[..., Path]) -> None:
    owner, stranger = service.client("admin"), service.client("admin", "other")
    await import_adapter(owner, "fox", make_adapter())
    await upload(owner)
    for path in ("/v1/files", "/v1/adapters", "/v1/fine_tuning/jobs"):
        assert (await stranger.get(path)).json()["data"] == []
    assert [card["parent"] for card in (await stranger.get("/v1/models")).json()["data"]] == [None]


async def test_the_same_name_in_two_tenants_is_two_adapters(
    service: Service, make_adapter: Callable[..., Path]
) -> None:
    one, two = service.client("admin"), service.client("admin", "other")
    first = (await import_adapter(one, "fox", make_adapter(1))).json()
    second = (await import_adapter(two, "fox", make_adapter(2))).json()
    assert first["digest"] != second["digest"]
    assert (first["tenant"], second["tenant"]) == ("default", "other")
    body = {"model": "fox", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    for client in (one, two):
        assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
    requests = service.script.requests
    assert [request.adapter.digest for request in requests if request.adapter] == [first["digest"], second["digest"]]
    assert requests[0].cache_salt != requests[1].cache_salt
    assert (await one.post("/v1/chat/completions", json={**body, "model": "other/fox"})).status_code == 404
    assert (await two.delete("/v1/adapters/fox")).status_code == 200
    assert (await one.get("/v1/adapters/fox")).status_code == 200


async def test_a_foreign_cursor_is_an_unknown_one(service: Service) -> None:
    owner, stranger = service.client("admin"), service.client("admin", "other")
    file_id = (await upload(owner)).json()["id"]
    foreign = await stranger.get(f"/v1/files?after={file_id}")
    absent = await stranger.get("/v1/files?after=file-none")
    assert (foreign.status_code, foreign.content) == (absent.status_code, absent.content)
