"""client.admin: what is sent, what is understood, and what is not sent twice."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

import tenora_client as tc
from tests.client.fake import Script, page, reply

TENANT: dict[str, Any] = {"id": "tenant-1", "object": "tenant", "name": "acme", "created_at": 1}
KEY: dict[str, Any] = {
    "id": "key-1",
    "object": "api_key",
    "name": "ci",
    "prefix": "tk-abc",
    "scopes": ["infer"],
    "created_at": 1,
    "expires_at": 3601,
    "revoked_at": None,
}
GONE = {"id": "acme", "object": "tenant", "deleted": True}
ADMIN = "/v1/admin/tenants"


def sent(script: Script) -> list[tuple[str, str]]:
    return [(request.method, request.url.raw_path.decode()) for request in script.requests]


def test_tenants() -> None:
    script = Script(
        reply(TENANT, 201), reply(TENANT), reply(page(TENANT)), reply(GONE), reply({**TENANT, "weight": 2.5})
    )
    with script.client() as client:
        tenants = client.admin.tenants
        assert tenants.create("acme") == tenants.get("a/b") == next(iter(tenants.list()))
        assert tenants.delete("acme").deleted
        assert tenants.update("acme", weight=2.5).weight == 2.5
    assert sent(script) == [
        ("POST", ADMIN),
        ("GET", f"{ADMIN}/a%2Fb"),
        ("GET", ADMIN),
        ("DELETE", f"{ADMIN}/acme"),
        ("PATCH", f"{ADMIN}/acme"),
    ]
    assert script.sent(4) == {"weight": 2.5}
    assert script.sent(0) == {"name": "acme"}


async def test_keys() -> None:
    script = Script(reply({**KEY, "secret": "tk-abc-def"}, 201), reply(page(KEY)), reply({**KEY, "revoked_at": 9}))
    async with script.async_client() as client:
        keys = client.admin.keys
        made = await keys.create("acme", ["infer"], name="ci", expires_in=3600)
        (listed,) = [key async for key in keys.list("acme")]
        revoked = await keys.revoke("acme", "key-1")
    assert (made.secret, made.scopes, made.expires_at) == ("tk-abc-def", ["infer"], 3601)
    assert (listed.prefix, listed.revoked_at, revoked.revoked_at) == ("tk-abc", None, 9)
    assert not hasattr(listed, "secret")
    assert script.sent(0) == {"scopes": ["infer"], "name": "ci", "expires_in": 3600}
    assert sent(script) == [
        ("POST", f"{ADMIN}/acme/keys"),
        ("GET", f"{ADMIN}/acme/keys"),
        ("POST", f"{ADMIN}/acme/keys/key-1/revoke"),
    ]


def test_a_key_that_may_have_been_made_is_not_made_again() -> None:
    script = Script(httpx.ReadError("the connection broke"), reply({**KEY, "secret": "tk-abc-def"}, 201))
    with script.client() as client, pytest.raises(tc.TransportError):
        client.admin.keys.create("acme", ["infer"])
    assert len(script.requests) == 1
