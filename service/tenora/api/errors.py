"""The one table from Tenora's error classes to HTTP, and the OpenAI error body.

Every answer that is not a success has the body `{"error": {"message", "type", "code", "param"}}`, whoever raised it: a
use case, validation, routing, a middleware or a bug.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Scope

from tenora import errors as e


class SlowRequestError(e.InvalidRequestError):
    """The client took too long to send the body."""

    code = "request_timeout"


class CompatibilityError(e.InvalidRequestError):
    """A request that vLLM's adapter endpoints answer with its own error type, which its clients look for."""

    code = "InvalidUserInput"


class ClientGoneError(Exception):
    """The client closed its connection before the answer was ready. Nobody reads what is answered now."""


@dataclass(frozen=True, slots=True)
class Answer:
    """How an error class is told over HTTP: the status and OpenAI's `type` word."""

    status: int
    type: str


TABLE: Mapping[type[e.TenoraError], Answer] = {
    e.InvalidRequestError: Answer(400, "invalid_request_error"),
    e.ContextLengthError: Answer(400, "invalid_request_error"),
    e.CompositionError: Answer(400, "invalid_request_error"),
    CompatibilityError: Answer(400, "InvalidUserInput"),
    SlowRequestError: Answer(408, "invalid_request_error"),
    e.AuthenticationError: Answer(401, "authentication_error"),
    e.PermissionDeniedError: Answer(403, "permission_error"),
    e.NotFoundError: Answer(404, "invalid_request_error"),
    e.ModelNotFoundError: Answer(404, "invalid_request_error"),
    e.ConflictError: Answer(409, "invalid_request_error"),
    e.PayloadTooLargeError: Answer(413, "invalid_request_error"),
    e.ArtifactError: Answer(422, "invalid_request_error"),
    e.AdapterFormatError: Answer(422, "invalid_request_error"),
    e.DatasetError: Answer(422, "invalid_request_error"),
    e.RateLimitedError: Answer(429, "rate_limit_error"),
    e.UnavailableError: Answer(503, "server_error"),
    e.PoolFullError: Answer(503, "server_error"),
    e.StorageFullError: Answer(507, "server_error"),
    e.AdapterDamagedError: Answer(500, "server_error"),
    # These concern the operator. A request that meets one was right; the server cannot serve it.
    e.UnsupportedModelError: Answer(500, "server_error"),
    e.TrainingError: Answer(500, "server_error"),
    e.ConfigurationError: Answer(500, "server_error"),
    e.SettingError: Answer(500, "server_error"),
}
# One class can mean two things to a client; the code tells them apart.
_BY_CODE: Mapping[str, Answer] = {"idempotency_mismatch": Answer(422, "invalid_request_error")}
_HTTP_WORDS: Mapping[int, tuple[str, str]] = {
    404: ("not_found", "There is no such route. GET /openapi.json lists them."),
    405: ("method_not_allowed", "This route does not take that method. GET /openapi.json lists what it takes."),
}


def answer_for(error: e.TenoraError) -> Answer:
    """The row of the table for the error's code, its class, or its closest ancestor that has one."""
    if error.code is not None and error.code in _BY_CODE:
        return _BY_CODE[error.code]
    for cls in type(error).__mro__:
        if cls in TABLE:
            return TABLE[cls]
    return Answer(500, "server_error")


def body(message: str, type_: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """The OpenAI error body."""
    return {"error": {"message": message, "type": type_, "code": code, "param": param}}


def error_body(error: e.TenoraError) -> dict[str, Any]:
    """The body of `error`; also what an SSE stream says when it breaks off."""
    return body(error.message, answer_for(error).type, error.code, error.param)


def error_response(scope: Scope, error: e.TenoraError) -> JSONResponse:
    """A complete response for `error`, with the headers that its status asks for; its code is noted for the metrics."""
    status = answer_for(error).status
    scope.setdefault("state", {})["error_code"] = error.code
    headers: dict[str, str] = {}
    if isinstance(error, e.RateLimitedError | e.UnavailableError):
        headers["retry-after"] = str(max(1, math.ceil(error.retry_after)))
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if status == 409:
        # The SDK repeats every 409 unless told otherwise. Ours are about state, so repeating cannot help, but for one.
        headers["x-should-retry"] = "true" if error.code == "idempotency_in_progress" else "false"
    if isinstance(error, e.AdapterDamagedError):
        headers["x-should-retry"] = "false"  # clients repeat a 500; only a new import helps
    if status in {408, 413}:
        headers["connection"] = "close"  # the rest of the body is not worth reading
    return JSONResponse(error_body(error), status, headers)


def as_tenora_error(error: BaseException) -> e.TenoraError | None:
    """`error` as one of ours if it, or what it was raised from, is one (a full disk counts); else None."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, e.TenoraError):
            return seen
        if isinstance(seen, OSError) and seen.errno in {errno.ENOSPC, errno.EDQUOT}:
            return e.StorageFullError(
                "The server's disk is full; nothing was stored. Free space or ask the operator, then repeat."
            )
        seen = seen.__cause__
    return None


def to_json(content: Mapping[str, Any]) -> str:
    """Compact JSON."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def internal_error_body(request_id: str) -> dict[str, Any]:
    """What a client learns of a bug: nothing but the id under which the log has it."""
    message = f"The server failed. Repeat the request, and if it fails again quote {request_id} to the operator."
    return body(message, "server_error", "internal_error")


def internal_error_response(request_id: str) -> JSONResponse:
    """The response of an unhandled exception."""
    return JSONResponse(internal_error_body(request_id), 500)


def field_name(location: Sequence[int | str]) -> str:
    """`("body", "messages", 0, "content")` as `messages[0].content`."""
    name = ""
    for part in location[1:]:
        if isinstance(part, str) and ("[" in part or "(" in part):
            continue  # pydantic's own word for a branch of a union or a dict's key
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name


def validation_error(problems: Sequence[Mapping[str, Any]]) -> e.InvalidRequestError:
    """The first of pydantic's findings as a sentence, which never repeats what was sent: it may be a prompt."""
    problem = problems[0]
    kind, location = str(problem["type"]), problem["loc"]
    if kind == "json_invalid":
        return e.InvalidRequestError("The body is not valid JSON. Send one JSON object.", code="invalid_json")
    param = e.brief(field_name(location), e.LONGEST_PARAM) or None
    if param is None:
        return e.InvalidRequestError(
            "The body must be one JSON object, sent with `Content-Type: application/json`.", code="invalid_json"
        )
    if kind == "extra_forbidden":
        return e.InvalidRequestError(
            f"Unknown field {param!r}. Remove it, or see GET /openapi.json for the fields of this call.",
            code="unknown_parameter",
            param=param,
        )
    if kind == "missing":
        return e.InvalidRequestError(f"The field {param!r} is missing.", code="missing_required_parameter", param=param)
    text = str(problem["msg"]).removeprefix("Value error, ").rstrip(".")
    code = kind if kind in {"unsupported_parameter", "context_length_exceeded"} else None
    return e.InvalidRequestError(f"{param}: {text}.", code=code, param=param)


async def _on_validation(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, RequestValidationError):
        raise error
    return error_response(request.scope, validation_error(error.errors()))


async def _on_tenora(request: Request, error: Exception) -> JSONResponse:
    known = as_tenora_error(error)
    if known is None:
        raise error
    return error_response(request.scope, known)


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, HTTPException):
        raise error
    known = as_tenora_error(error)  # FastAPI turns what reading the body raised into a 400; the cause knows better
    if known is not None:
        return error_response(request.scope, known)
    code, message = _HTTP_WORDS.get(
        error.status_code, ("invalid_request", "The request could not be read. Check its body and headers.")
    )
    return JSONResponse(body(message, "invalid_request_error", code), error.status_code, error.headers)


async def _on_client_gone(_: Request, __: Exception) -> Response:
    return Response(status_code=499)


def install(app: FastAPI) -> None:
    """Make every exception that reaches the router an answer of the table."""
    app.add_exception_handler(RequestValidationError, _on_validation)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(e.TenoraError, _on_tenora)
    app.add_exception_handler(OSError, _on_tenora)
    app.add_exception_handler(ClientGoneError, _on_client_gone)
    app.add_exception_handler(ClientDisconnect, _on_client_gone)
