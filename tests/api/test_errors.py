"""The one table from errors to HTTP, and the one shape of every error."""

from __future__ import annotations

import errno
import inspect

import pytest
from fastapi import FastAPI

from tenora import errors as e
from tenora.api import errors
from tests.api.conftest import Service

STATUS = {
    e.InvalidRequestError: 400,
    e.CompositionError: 400,
    e.ContextLengthError: 400,
    e.AuthenticationError: 401,
    e.PermissionDeniedError: 403,
    e.NotFoundError: 404,
    e.ModelNotFoundError: 404,
    e.ConflictError: 409,
    e.PayloadTooLargeError: 413,
    e.ArtifactError: 422,
    e.AdapterFormatError: 422,
    e.DatasetError: 422,
    e.RateLimitedError: 429,
    e.UnavailableError: 503,
    e.PoolFullError: 503,
    e.StorageFullError: 507,
    e.AdapterDamagedError: 500,
    e.UnsupportedModelError: 500,
    e.TrainingError: 500,
    e.ConfigurationError: 500,
    e.SettingError: 500,
}


def test_every_error_of_the_tree_has_a_row() -> None:
    tree = {cls for _, cls in inspect.getmembers(e, inspect.isclass) if issubclass(cls, e.TenoraError)}
    assert tree - {e.TenoraError} == set(STATUS)
    assert {cls: errors.TABLE[cls].status for cls in STATUS} == STATUS


def test_a_new_subclass_is_told_as_its_parent() -> None:
    class Fresh(e.ConflictError):
        pass

    assert errors.answer_for(Fresh("x")).status == 409
    assert errors.answer_for(e.InvalidRequestError("x", code="idempotency_mismatch")).status == 422


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (e.RateLimitedError("later", retry_after=2.1), {"retry-after": "3"}),
        (e.UnavailableError("later", retry_after=0.0), {"retry-after": "1"}),
        (e.ConflictError("no"), {"x-should-retry": "false"}),
        (e.ConflictError("wait", code="idempotency_in_progress"), {"x-should-retry": "true"}),
        (e.AuthenticationError("no"), {"www-authenticate": "Bearer"}),
        (e.PayloadTooLargeError("no"), {"connection": "close"}),
    ],
)
def test_headers(error: e.TenoraError, headers: dict[str, str]) -> None:
    response = errors.error_response({"type": "http"}, error)
    assert {name: response.headers.get(name) for name in headers} == headers


def test_a_full_disk_is_507_wherever_it_is_met() -> None:
    deep = RuntimeError("wrapped")
    deep.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert isinstance(errors.as_tenora_error(deep), e.StorageFullError)
    assert errors.as_tenora_error(OSError(errno.EACCES, "denied")) is None


@pytest.mark.parametrize(
    ("location", "name"),
    [
        (("body", "messages", 0, "content"), "messages[0].content"),
        (("query", "limit"), "limit"),
        (("body", "logit_bias", "x", "[key]"), "logit_bias.x"),
        (("body",), ""),
    ],
)
def test_field_names(location: tuple[int | str, ...], name: str) -> None:
    assert errors.field_name(location) == name


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("GET", "/nowhere", None, 404, "not_found", None),
        ("PUT", "/v1/models", None, 405, "method_not_allowed", None),
        ("POST", "/v1/chat/completions", b"{", 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"[1]", 400, "invalid_json", None),
        ("POST", "/v1/chat/completions", b"{}", 400, "missing_required_parameter", "messages"),
        ("POST", "/v1/chat/completions", b'{"messages": [], "secret": 1}', 400, "invalid_value", "messages"),
        ("GET", "/v1/files?limit=0", None, 400, "invalid_value", "limit"),
    ],
)
async def test_everything_has_the_same_shape(
    service: Service, method: str, path: str, body: bytes | None, status: int, code: str, param: str | None
) -> None:
    headers = {"content-type": "application/json"}
    response = await service.client().request(method, path, content=body, headers=headers)
    assert response.status_code == status
    error = response.json()["error"]
    assert list(response.json()) == ["error"]
    assert list(error) == ["message", "type", "code", "param"]
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
    assert response.headers["x-request-id"]


async def test_a_bug_is_a_500_that_tells_nothing(service: Service) -> None:
    app: FastAPI = service.app

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("the secret ingredient")

    response = await service.client().get("/broken")
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "ingredient" not in response.text
    assert response.headers["x-request-id"] in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("sent", "kept"), [("abc_123-DEF", True), ("short", False), ("a b c d e f", False), ("x" * 65, False)]
)
async def test_request_ids_are_kept_only_if_they_are_harmless(service: Service, sent: str, kept: bool) -> None:
    response = await service.client().get("/livez", headers={"x-request-id": sent})
    assert (response.headers["x-request-id"] == sent) is kept
