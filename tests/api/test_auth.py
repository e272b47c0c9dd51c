"""Deny by default, and one scope for each thing that a key may do."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.dependencies.models import Dependant
from fastapi.routing import APIRoute

from tenora.api.dependencies import Caller
from tenora.api.middleware import OPEN_PATHS, PROBE_PATHS
from tenora.control.tenancy.access import ACTIONS
from tests.api.conftest import Service

SCOPE_OF = {
    "infer": {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/classify",
        "/pooling",
        "/v1/rewards",
        "/v1/models",
        "/v1/models/{model}",
    },
    "train": {
        "/v1/files",
        "/v1/files/{file_id}",
        "/v1/files/{file_id}/content",
        "/v1/files/{file_id}/preview",
        "/v1/fine_tuning/estimate",
        "/v1/fine_tuning/jobs",
        "/v1/fine_tuning/jobs/{job_id}",
        "/v1/fine_tuning/jobs/{job_id}/cancel",
        "/v1/fine_tuning/jobs/{job_id}/pause",
        "/v1/fine_tuning/jobs/{job_id}/resume",
        "/v1/fine_tuning/jobs/{job_id}/events",
        "/v1/fine_tuning/jobs/{job_id}/checkpoints",
    },
    "adapters": {
        "/v1/adapters",
        "/v1/adapters/{name}",
        "/v1/adapters/{name}/versions",
        "/v1/adapters/{name}/rollback",
        "/v1/adapters/{name}/pin",
        "/v1/adapters/{name}/unpin",
        "/v1/adapters/{name}/download",
        "/v1/unload_lora_adapter",
    },
    "operator": {
        "/v1/load_lora_adapter",
        "/v1/admin/tenants",
        "/v1/admin/tenants/{tenant}",
        "/v1/admin/tenants/{tenant}/keys",
        "/v1/admin/tenants/{tenant}/keys/{key_id}/revoke",
    },
    "any key": {"/health", "/metrics"},
}


def scope_of(path: str) -> str:
    return next(need for need, paths in SCOPE_OF.items() if path in paths)


def is_deletion_of_a_model(methods: Collection[str], path: str) -> bool:
    """It is the deletion of an adapter: the same path, another scope."""
    return path == "/v1/models/{model}" and set(methods) == {"DELETE"}


def operations(service: Service) -> Iterator[tuple[str, str]]:
    """(method, path) of every operation of the OpenAPI document."""
    for path, methods in service.app.openapi()["paths"].items():
        for method in methods:
            yield method.upper(), path


def fill(path: str) -> str:
    """A path with something for each parameter."""
    for name in ("model", "file_id", "job_id", "name", "tenant", "key_id"):
        path = path.replace("{" + name + "}", "something")
    return path


def api_routes(routes: Any) -> Iterator[APIRoute]:
    """Every APIRoute, also of routers that were included."""
    for route in routes:
        if isinstance(route, APIRoute):
            yield route
        else:
            router = getattr(route, "original_router", None)
            yield from api_routes(router.routes if router is not None else ())


def actions_of(dependant: Dependant) -> list[str]:
    own = [dependant.call.action] if isinstance(dependant.call, Caller) else []
    return own + [action for sub in dependant.dependencies for action in actions_of(sub)]


async def test_only_the_two_probes_are_open(service: Service) -> None:
    paths = {route.path for route in service.app.routes if hasattr(route, "path")} | {p for _, p in operations(service)}
    assert {"/openapi.json", "/docs", "/metrics", "/v1/models", "/livez"} <= paths
    nobody, stranger = service.client_with(None), service.client_with("tk-000000000000-" + "x" * 43)
    for path in [*sorted(paths), "/nowhere", "/livez/", "//livez"]:
        for client in (nobody, stranger):
            response = await client.get(fill(path).split("{", maxsplit=1)[0])
            assert (response.status_code == 200) is (path in OPEN_PATHS), path
            if path not in OPEN_PATHS:
                assert response.status_code == 401, path
                assert response.json()["error"]["type"] == "authentication_error"


async def test_every_method_of_every_route_asks_for_a_key(service: Service) -> None:
    nobody = service.client_with(None)
    for method, path in operations(service):
        if path not in OPEN_PATHS:
            assert (await nobody.request(method, fill(path))).status_code == 401, (method, path)


def test_every_route_declares_its_action(service: Service) -> None:
    """Also the routes that somebody adds tomorrow: one without a Caller fails here."""
    seen = []
    for route in api_routes(service.app.routes):
        if route.path not in OPEN_PATHS:
            actions = actions_of(route.dependant)
            assert len(actions) == 1, route.path
            needed = (
                "adapters" if is_deletion_of_a_model(route.methods, route.path_format) else scope_of(route.path_format)
            )
            assert ACTIONS[actions[0]] == needed, route.path
            seen += actions
    assert sorted(seen) == sorted(ACTIONS)


@pytest.mark.parametrize("scope", ["infer", "train", "adapters", "admin"])
async def test_scopes_matrix(service: Service, scope: str) -> None:
    client = service.client(scope)
    for method, path in operations(service):
        if path in PROBE_PATHS:
            continue
        needed = "adapters" if is_deletion_of_a_model({method}, path) else scope_of(path)
        response = await client.request(method, fill(path), json={} if method == "POST" else None)
        refused = response.status_code == 403
        opens = {needed, "admin"}  # the client is the default tenant's, whose admin is the operator
        assert refused is (scope not in opens), (method, path, response.text)
        if refused:
            assert response.json()["error"]["code"] == "insufficient_scope"


@pytest.mark.parametrize(
    "header", ["Basic abc", "Bearer", "Bearer ", "bearer", "Token x", "Bearer " + "x" * 1000, "Bearer \u00e4\u00f6"]
)
async def test_malformed_credentials(service: Service, header: str) -> None:
    response = await service.client_with(None).get("/v1/models", headers={"authorization": header.encode("utf-8")})
    assert response.status_code == 401


async def test_two_authorization_headers_are_refused(service: Service) -> None:
    good = ("authorization", f"Bearer {service.keys['default']['admin']}")
    response = await service.client_with(None).get("/v1/models", headers=[good, ("authorization", "Bearer other")])
    assert response.status_code == 401


async def test_a_revoked_key_stops(service: Service) -> None:
    tenant = await service.control.tenants.get("default")
    record, secret = await service.control.keys.create(tenant.id, ["infer"])
    client = service.client_with(secret)
    assert (await client.get("/metrics")).status_code == 200
    await service.control.keys.revoke(tenant.id, record.id)
    assert (await client.get("/metrics")).status_code == 401


async def test_scope_is_checked_before_the_adapter_is_looked_up(
    service: Service, make_adapter: Callable[..., Path]
) -> None:
    response = await service.client("infer").get("/v1/adapters/anything")
    assert response.status_code == 403
