"""/v1/admin: the operator makes and ends tenants and keys; nobody else gets that far."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tenora.control.tenancy.access import Attempt
from tests.api.conftest import Service, import_adapter, upload
from tests.api.test_auth import fill, operations

TENANTS = "/v1/admin/tenants"


async def new_key(service: Service, tenant: str, *scopes: str, **more: Any) -> dict[str, Any]:
    made = await service.client().post(f"{TENANTS}/{tenant}/keys", json={"scopes": scopes, **more})
    assert made.status_code == 201, made.text
    key: dict[str, Any] = made.json()
    return key


async def test_life_of_a_tenant(service: Service) -> None:
    operator = service.client()
    made = await operator.post(TENANTS, json={"name": "acme"})
    assert made.status_code == 201
    tenant = made.json()
    shown = {"id": 0, "object": "tenant", "name": "acme", "created_at": 0, "weight": 1.0}
    assert tenant | {"id": 0, "created_at": 0} == shown
    assert (await operator.get(f"{TENANTS}/acme")).json() == tenant
    listed = (await operator.get(TENANTS)).json()
    assert [one["name"] for one in listed["data"]] == ["acme", "default", "other"]
    again = await operator.post(TENANTS, json={"name": "acme"})
    assert (again.status_code, again.json()["error"]["param"]) == (409, "name")
    deleted = await operator.delete(f"{TENANTS}/acme")
    assert deleted.json() == {"id": "acme", "object": "tenant", "deleted": True}
    for gone in (await operator.get(f"{TENANTS}/acme"), await operator.delete(f"{TENANTS}/acme")):
        assert (gone.status_code, gone.json()["error"]["param"]) == (404, "tenant")
    kept = await operator.delete(f"{TENANTS}/default")
    assert kept.status_code == 409


async def test_a_tenant_is_given_another_weight(service: Service) -> None:
    operator, told = service.client(), []

    async def hook(attempt: Attempt) -> None:
        told.append((attempt.action, attempt.resource))

    service.control.access.hooks.append(hook)
    changed = await operator.patch(f"{TENANTS}/other", json={"weight": 2.5})
    assert (changed.status_code, changed.json()["weight"]) == (200, 2.5)
    assert told == [("tenants.update", "other")]
    assert (await operator.get(f"{TENANTS}/other")).json() == changed.json()
    for weight in (0, 0.001, 101, -1, "many", None):
        refused = await operator.patch(f"{TENANTS}/other", json={"weight": weight})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "weight"), weight
    for content in ('{"weight": NaN}', '{"weight": Infinity}', "{}"):
        refused = await operator.patch(
            f"{TENANTS}/other", content=content, headers={"content-type": "application/json"}
        )
        assert refused.status_code == 400, content
    assert (await operator.get(f"{TENANTS}/other")).json()["weight"] == 2.5
    missing = await operator.patch(f"{TENANTS}/nobody", json={"weight": 2})
    assert (missing.status_code, missing.json()["error"]["param"]) == (404, "tenant")


@pytest.mark.parametrize("name", ["", "Acme", "a/b", "x" * 64, 5, None])
async def test_bad_names_are_refused(service: Service, name: Any) -> None:
    response = await service.client().post(TENANTS, json={"name": name})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "name")


async def test_a_secret_is_shown_once(service: Service) -> None:
    operator = service.client()
    answer = await operator.post(f"{TENANTS}/other/keys", json={"scopes": ["infer", "train"], "name": "ci"})
    assert (answer.status_code, answer.headers["cache-control"]) == (201, "no-store")
    made = answer.json()
    secret = made.pop("secret")
    assert made["scopes"] == ["infer", "train"]
    assert (made["object"], made["name"], made["expires_at"], made["revoked_at"]) == ("api_key", "ci", None, None)
    listed = await operator.get(f"{TENANTS}/other/keys")
    assert made in listed.json()["data"]
    assert secret not in listed.text
    assert (await service.client_with(secret).get("/v1/files")).json()["data"] == []


async def test_a_revoked_key_stops_and_stays_listed(service: Service) -> None:
    key = await new_key(service, "other", "infer", expires_in=3600)
    assert key["expires_at"] == key["created_at"] + 3600
    path = f"{TENANTS}/other/keys/{key['id']}/revoke"
    first = (await service.client().post(path)).json()
    assert first["revoked_at"] is not None
    assert (await service.client().post(path)).json() == first
    assert (await service.client_with(key["secret"]).get("/v1/models")).status_code == 401
    of_another = await service.client().post(f"{TENANTS}/default/keys/{key['id']}/revoke")
    assert (of_another.status_code, of_another.json()["error"]["param"]) == (404, "key_id")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "scopes"),
        ({"scopes": []}, "scopes"),
        ({"scopes": ["everything"]}, "scopes[0]"),
        ({"scopes": ["infer"], "name": ""}, "name"),
        ({"scopes": ["infer"], "expires_in": 0}, "expires_in"),
        ({"scopes": ["infer"], "expires_in": 10**12}, "expires_in"),
        ({"scopes": ["infer"], "secret": "tk-mine"}, "secret"),
    ],
)
async def test_bad_keys_are_refused(service: Service, body: dict[str, Any], param: str) -> None:
    response = await service.client().post(f"{TENANTS}/other/keys", json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text


async def test_no_tenants_admin_gets_that_far(service: Service) -> None:
    """Nor learns which tenants there are."""
    stranger, checked = service.client("admin", "other"), 0
    for method, path in operations(service):
        if path.startswith("/v1/admin/"):
            answers = {
                (response.status_code, response.content)
                for name in ("default", "other", "nobody")
                for response in [await stranger.request(method, fill(path.replace("{tenant}", name)), json={})]
            }
            assert len(answers) == 1
            status, body = answers.pop()
            assert (status, json.loads(body)["error"]["code"]) == (403, "insufficient_scope")
            checked += 1
    assert checked == 8


async def test_a_deleted_tenants_key_file_adapter_and_name_are_gone(
    service: Service, make_adapter: Callable[..., Path]
) -> None:
    theirs = service.client("admin", "other")
    assert (await import_adapter(theirs, "fox", make_adapter(1))).status_code == 201
    assert (await import_adapter(service.client(), "fox", make_adapter(2))).status_code == 201
    assert (await upload(theirs)).status_code == 200
    assert (await service.client().delete(f"{TENANTS}/other")).status_code == 200
    assert (await theirs.get("/v1/adapters")).status_code == 401
    await service.client().post(TENANTS, json={"name": "other"})
    key = await new_key(service, "other", "admin")
    anew = service.client_with(key["secret"])
    for path in ("/v1/adapters", "/v1/files", "/v1/fine_tuning/jobs"):
        assert (await anew.get(path)).json()["data"] == []
    assert [one["name"] for one in (await service.client().get("/v1/adapters")).json()["data"]] == ["fox"]
