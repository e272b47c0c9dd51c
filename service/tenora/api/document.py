"""The OpenAPI document: FastAPI's, with every status that is answered, the one shape of errors, and the key."""

from __future__ import annotations

from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

from tenora.api.middleware import OPEN_PATHS, PROBE_PATHS

_SECURITY = "key"
_TEXT = {"type": "string"}
_WORD = {"anyOf": [_TEXT, {"type": "null"}]}
_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "code", "param"],
            "properties": {"message": _TEXT, "type": _TEXT, "code": _WORD, "param": _WORD},
        }
    },
}
_STATUS = {"type": "object", "required": ["status"], "properties": {"status": _TEXT}}
_INFERENCE = frozenset({"/v1/chat/completions", "/v1/completions"})
_READING = frozenset({"/v1/embeddings", "/classify", "/pooling", "/v1/rewards"})
# Text is worked on, on threads for which a tenant may queue only so long.
_QUEUED = _INFERENCE | _READING | {"/v1/files", "/v1/files/{file_id}/preview", "/v1/fine_tuning/estimate"}
_HEALTH = PROBE_PATHS - {"/metrics"}
# Bodies that FastAPI cannot know, because the routes write them themselves.
_MEDIA = {
    "/metrics": "text/plain",
    "/v1/files/{file_id}/content": "application/octet-stream",
    "/v1/adapters/{name}/download": "application/zip",
}


def install(app: FastAPI) -> None:
    """Make `app.openapi()` give the document."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _completed(
                get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            )
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]  # FastAPI's own way to extend it


def _completed(document: dict[str, Any]) -> dict[str, Any]:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    schemas["Error"], schemas["Status"] = _ERROR, _STATUS
    for unused in ("HTTPValidationError", "ValidationError"):  # FastAPI's shape, which nothing here answers
        schemas.pop(unused, None)
    components["securitySchemes"] = {_SECURITY: {"type": "http", "scheme": "bearer"}}
    document["security"] = [{_SECURITY: []}]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            _complete(path, method, operation)
    return document


def _complete(path: str, method: str, operation: dict[str, Any]) -> None:
    if path in OPEN_PATHS:
        operation["security"] = []
    responses = operation["responses"]
    responses.pop("422", None)
    if path in _MEDIA:
        responses["200"]["content"] = {_MEDIA[path]: {"schema": {"type": "string"}}}
    if path in _HEALTH:
        responses["200"]["content"] = _json("Status")
    if path in _INFERENCE:
        responses["200"]["content"]["text/event-stream"] = {"schema": {"type": "string"}}
    for status in _refusals(path, method, operation):
        responses[str(status.value)] = {"description": status.phrase, "content": _json("Error")}
    if path in _HEALTH:
        responses["503"] = {"description": "Not now; `status` says why.", "content": _json("Status")}


def _refusals(path: str, method: str, operation: dict[str, Any]) -> Iterator[HTTPStatus]:
    """The statuses of errors that this operation can answer, by what it takes and does."""
    # Before any route: a request that cannot be read, and a crowded or failing server.
    yield from (HTTPStatus.BAD_REQUEST, HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    yield from (HTTPStatus.REQUEST_URI_TOO_LONG, HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
    yield from (HTTPStatus.INTERNAL_SERVER_ERROR, HTTPStatus.SERVICE_UNAVAILABLE)
    if path in OPEN_PATHS:
        return
    yield HTTPStatus.UNAUTHORIZED
    if path in PROBE_PATHS:
        return
    yield HTTPStatus.FORBIDDEN
    names_something = any(parameter["in"] == "path" for parameter in operation.get("parameters", ()))
    if names_something or "requestBody" in operation or "{" in path:
        yield HTTPStatus.NOT_FOUND
    if path in _QUEUED and method == "post":
        yield HTTPStatus.TOO_MANY_REQUESTS
    if method in {"post", "delete"}:
        yield from (HTTPStatus.CONFLICT, HTTPStatus.INSUFFICIENT_STORAGE)
    if path.endswith("/download"):
        yield HTTPStatus.INSUFFICIENT_STORAGE  # the archive is made aside
    if method == "post":
        yield HTTPStatus.UNPROCESSABLE_ENTITY
    if (method == "get" and path in {"/v1/files", "/v1/fine_tuning/jobs"}) or "events" in path or "checkpoints" in path:
        yield HTTPStatus.NOT_FOUND  # of `after`


def _json(schema: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}}
