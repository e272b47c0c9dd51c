"""What every request passes on its way in, outermost first: RequestContext → DrainGate → Authentication → BodyLimit.

They are plain ASGI: nothing is buffered, and a disconnect reaches the route that waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tenora.api import errors
from tenora.api.lifecycle import Lifecycle
from tenora.config import Settings
from tenora.control.tenancy.records import Principal
from tenora.errors import AuthenticationError, PayloadTooLargeError, TenoraError
from tenora.telemetry.logs import request_id as current_request_id
from tenora.telemetry.metrics import Metrics

OPEN_PATHS = frozenset({"/livez", "/readyz"})  # everything else needs a key
PROBE_PATHS = OPEN_PATHS | {"/health", "/metrics"}  # these answer while the server drains
BODY_SECONDS = 60.0  # longest silence between two pieces of a body
BODY_BYTES_PER_SECOND = 1024  # slower than this, after the first BODY_SECONDS, a body is not waited for
_REQUEST_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{7,63}")
_MULTIPART_OVERHEAD = 256 * 2**10  # boundaries, part headers and the small fields beside the file

log = logging.getLogger("tenora.access")


class RequestContext:
    """Gives each request its id, its access-log line, and a 500 without internals if nothing else answered."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = accepted_request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status: int | None = None
        started = time.monotonic()

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        token = current_request_id.set(request_id)
        try:
            await self.app(scope, receive, tagged)
        except Exception as error:
            # The last resort. The message stays in the log: it may hold anything.
            log.exception("unhandled error", extra={"error_class": type(error).__name__})
            if status is not None:
                raise  # too late to answer: the server must cut the connection
            scope["state"]["error_code"] = "internal_error"
            await errors.internal_error_response(request_id)(scope, receive, tagged)
        finally:
            self._record(scope, status, time.monotonic() - started)
            current_request_id.reset(token)

    def _record(self, scope: Scope, status: int | None, seconds: float) -> None:
        state = scope["state"]
        principal: Principal | None = state.get("principal")
        if status is not None and status >= 400:
            self.metrics.rejected(state.get("error_code") or f"http_{status}")
        route = scope.get("route")
        fields: dict[str, Any] = {
            "method": scope["method"],
            "route": getattr(route, "path", None),  # the template: a path may hold a tenant's names
            "status": status,  # None: the client left first
            "milliseconds": round(seconds * 1000, 1),
            "tenant": principal.tenant_id if principal else None,
            "key": principal.key_id if principal else None,
        }
        level = logging.DEBUG if scope["path"] in PROBE_PATHS else logging.INFO
        log.log(level, "request", extra=fields)


def accepted_request_id(sent: str | None) -> str:
    """The client's id if it matches the strict pattern, else a fresh one."""
    if sent is not None and _REQUEST_ID.fullmatch(sent):
        return sent
    return f"req_{secrets.token_hex(12)}"


class DrainGate:
    """Counts the requests that are open, and turns new ones away once the server drains."""

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self.app = app
        self.lifecycle = lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http" or scope["path"] in PROBE_PATHS:
            await self.app(scope, receive, send)
            return
        if self.lifecycle.draining:
            response = errors.error_response(scope, self.lifecycle.shutting_down())
            response.headers["connection"] = "close"
            await response(scope, receive, send)
            return
        with self.lifecycle.open_request():
            await self.app(scope, receive, send)


class Authentication:
    """Deny by default: without a valid key nothing but the two probes is reached, not even a 404."""

    def __init__(self, app: ASGIApp, authenticate: Callable[[str], Awaitable[Principal]]) -> None:
        self.app = app
        self.authenticate = authenticate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        if scope["path"] not in OPEN_PATHS:
            try:
                scope["state"]["principal"] = await self.authenticate(bearer_secret(Headers(scope=scope)))
            except TenoraError as error:
                await errors.error_response(scope, error)(scope, receive, send)
                return
        await self.app(scope, receive, send)


def bearer_secret(headers: Headers) -> str:
    """The secret of the Authorization header.

    Raises:
        AuthenticationError: if there is none, or it is not a bearer key.
    """
    values = headers.getlist("authorization")
    if len(values) == 1:
        scheme, _, secret = values[0].partition(" ")
        secret = secret.strip()
        if scheme.lower() == "bearer" and secret and len(secret) <= 256 and secret.isascii():
            return secret
    raise AuthenticationError("No API key. Send it as `Authorization: Bearer <key>`.")


class BodyLimit:
    """Bounds each body while it arrives, before anything is parsed: its size, and the time that it is waited for."""

    def __init__(self, app: ASGIApp, settings: Settings, seconds: float = BODY_SECONDS) -> None:
        self.app = app
        self.seconds = seconds
        self.default = settings.max_body_bytes
        self.limits = {
            "/v1/files": settings.max_file_bytes + _MULTIPART_OVERHEAD,
            "/v1/adapters": settings.max_adapter_bytes + _MULTIPART_OVERHEAD,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        limit = self.limits.get(scope["path"], self.default)
        too_large = PayloadTooLargeError(f"The body is larger than the limit of {limit} bytes. Send less, or in parts.")
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared) > limit:
            await errors.error_response(scope, too_large)(scope, receive, send)
            return
        received = 0
        waited = 0.0  # for the client; what the route takes for what has come is not the client's fault
        complete = False

        async def bounded() -> Message:
            nonlocal received, waited, complete
            if complete:
                return await receive()  # what follows is the disconnect, which may take as long as it likes
            began = time.monotonic()
            left = self.seconds + received / BODY_BYTES_PER_SECOND - waited
            try:
                message = await asyncio.wait_for(receive(), min(self.seconds, left))
            except TimeoutError:
                raise errors.SlowRequestError(
                    f"The body came to a halt, or at less than {BODY_BYTES_PER_SECOND} bytes a second. Send it again."
                ) from None
            waited += time.monotonic() - began
            if message["type"] == "http.request":
                received += len(message.get("body", b""))
                complete = not message.get("more_body", False)
                if received > limit:
                    raise too_large
            return message

        await self.app(scope, bounded, send)
