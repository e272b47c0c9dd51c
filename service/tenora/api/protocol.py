"""HTTP/1.1 on one connection: uvicorn's protocol with bounds on what comes before a request has an owner.

Everything here is open to anybody who reaches the port, so each bound is looked at before the work that it bounds: the
parser joins the pieces of a header, which takes time quadratic in a header that does not end.
"""

from __future__ import annotations

import asyncio
from asyncio import TimerHandle
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

import httptools
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn import Config
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
from uvicorn.server import ServerState

from tenora.api import errors
from tenora.api.connections import Connections
from tenora.api.middleware import OPEN_PATHS, accepted_request_id
from tenora.errors import UnavailableError

HEAD_BYTES = 2**16  # request line and headers together
TARGET_BYTES = 2**13  # path and query
HEADERS = 100
PIPELINED = 16  # requests that may wait for the answers to those before them
HEAD_SECONDS = 20.0  # from the connection, or a request's first byte, to the end of its headers
REST_SECONDS = 20.0  # for what is left of a body after its answer
STALL_SECONDS = 60.0  # a reader that takes nothing of an answer for this long is cut off
LINGER_SECONDS = 2.0  # after a refusal the rest is read: a reset would overtake the answer


class RefusedError(Exception):
    """The request passes a bound, or is none; how that is told."""

    def __init__(self, status: HTTPStatus, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message


def _malformed(message: str) -> RefusedError:
    return RefusedError(HTTPStatus.BAD_REQUEST, "invalid_request", message)


def _large(message: str) -> RefusedError:
    return RefusedError(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "headers_too_large", message)


class BoundedProtocol(HttpToolsProtocol):
    """One connection. It waits for a request, serves it, and waits again; a refusal ends it.

    Attributes:
        open_connections: the server's, of which this is one; a subclass for each server sets it (see `bounded`).
        head_seconds: as HEAD_SECONDS.
    """

    open_connections: Connections
    head_seconds = HEAD_SECONDS

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._application: ASGIApp = self.app
        self.app = self._serve
        self._in_head = False  # between the first byte of a request and the end of its headers
        self._in_body = False
        self._yielded = False  # the parser has given something whole since the last piece was fed
        self._unyielded = 0  # bytes that it has taken without giving anything
        self._header_count = 0
        self._header_bytes = 0
        self._refused = False
        self._deadline: TimerHandle | None = None
        self._stall: TimerHandle | None = None

    # ---- the connection ----------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as in uvicorn: only TCP comes here
        """Take the connection if there is a place for it."""
        super().connection_made(transport)
        if self.open_connections.admit(self, self._drop):
            self._arm(self.head_seconds, self._head_is_late)
        else:
            self._drop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Let go of everything."""
        self.open_connections.closed(self)
        self._disarm()
        self.resume_writing()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what has come, unless something in it has no end."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        if not (self._in_head or self._in_body or self._unyielded or self._answering):
            self._arm(self.head_seconds, self._head_is_late)
        self._yielded = False
        try:
            self.parser.feed_data(data)
            self._count(len(data))
        except httptools.HttpParserUpgrade:
            return  # we speak nothing else; the request itself is whole, and is answered
        except (httptools.HttpParserError, RefusedError) as error:
            known = error if isinstance(error, RefusedError) else error.__context__  # what a callback raised
            self._refuse(known if isinstance(known, RefusedError) else _malformed("This is no HTTP/1.1 request."))

    def _count(self, size: int) -> None:
        """Bound what has no end yet: the head, a trailer, a chunk's extension, or empty lines before a request."""
        if self._yielded:
            self._unyielded = 0
        else:
            self._unyielded += size
        if self._unyielded > HEAD_BYTES:
            raise _large(
                f"The request line and headers are longer than {HEAD_BYTES} bytes. Send fewer or shorter ones."
            )

    # ---- what the parser finds ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """A request begins."""
        super().on_message_begin()
        self._in_head = True
        self._header_count = self._header_bytes = 0

    def on_url(self, url: bytes) -> None:
        """A piece of the request's target."""
        super().on_url(url)
        if len(self.url) > TARGET_BYTES:
            raise RefusedError(
                HTTPStatus.REQUEST_URI_TOO_LONG, "uri_too_long", f"The URL is longer than {TARGET_BYTES} bytes."
            )

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or behind a chunked body a trailer, which nobody reads."""
        self._header_count += 1
        self._header_bytes += len(name) + len(value)
        if self._header_count > HEADERS:
            raise _large(f"The request has more than {HEADERS} headers. Send fewer.")
        if self._header_bytes > HEAD_BYTES:
            raise _large(f"The headers are longer than {HEAD_BYTES} bytes. Send fewer or shorter ones.")
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """From here on the request is the application's, which bounds its body."""
        hosts = sum(name == b"host" for name, _ in self.headers)
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            raise _malformed("A request must have exactly one Host header.")
        if len(self.pipeline) >= PIPELINED:
            raise _malformed(f"More than {PIPELINED} requests wait on this connection. Read their answers first.")
        self._in_head, self._in_body, self._yielded = False, True, True
        self._disarm()
        self.open_connections.busy(self)
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._yielded = True
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The whole request has come."""
        self._in_body, self._yielded = False, True
        super().on_message_complete()
        if not self._answering:
            self._wait()

    # ---- answers -----------------------------------------------------------------------------------------------------

    @property
    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self.open_connections.crowded or scope["path"] in OPEN_PATHS:
            await self._application(scope, receive, send)
            return
        crowded = UnavailableError("Too many connections are open; retry in a moment.", code="too_many_connections")
        response = errors.error_response(scope, crowded)
        response.headers["x-request-id"] = accepted_request_id(None)
        response.headers["connection"] = "close"
        await response(scope, receive, send)

    def on_response_complete(self) -> None:
        """Go on with the next request, or wait for one."""
        super().on_response_complete()
        if not self._answering and not self.transport.is_closing():
            self._wait()

    def _wait(self) -> None:
        self.open_connections.waits(self, self._drop)
        if self._in_body:
            self._arm(REST_SECONDS, self._drop)
        elif self._in_head:
            self._arm(self.head_seconds, self._head_is_late)
        else:
            self._arm(self.timeout_keep_alive, self.timeout_keep_alive_handler)

    def pause_writing(self) -> None:
        """The client does not take what it is sent."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(STALL_SECONDS, self._drop)

    def resume_writing(self) -> None:
        """It takes it again."""
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None
        super().resume_writing()

    # ---- ends --------------------------------------------------------------------------------------------------------

    def _head_is_late(self) -> None:
        if self._in_head:
            message = f"The headers did not end within {self.head_seconds:g} seconds. Send the request again."
            self._refuse(RefusedError(HTTPStatus.REQUEST_TIMEOUT, "request_timeout", message))
        else:
            self._drop()

    def _refuse(self, error: RefusedError) -> None:
        if self._answering or self.transport.is_closing():
            self._drop()  # an answer now would be taken for the one to the request before
            return
        self._refused = True
        body = errors.to_json(errors.body(error.message, "invalid_request_error", error.code)).encode()
        head = (
            f"HTTP/1.1 {error.status.value} {error.status.phrase}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nx-request-id: {accepted_request_id(None)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.write_eof()
        self.open_connections.waits(self, self._drop)
        self._arm(LINGER_SECONDS, self._drop)

    def _drop(self) -> None:
        self.open_connections.closed(self)
        self.transport.abort()

    def _arm(self, seconds: float, then: Callable[[], None]) -> None:
        self._disarm()
        self._deadline = self.loop.call_later(seconds, then)

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def bounded(connections: Connections, *, head_seconds: float = HEAD_SECONDS) -> type[BoundedProtocol]:
    """The protocol of one server, whose connections share a bound."""
    return type("ServerProtocol", (BoundedProtocol,), {"open_connections": connections, "head_seconds": head_seconds})
