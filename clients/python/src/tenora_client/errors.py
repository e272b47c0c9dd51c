"""Every error that this package raises, as one tree.

TenoraError
├── ConfigurationError          no key, or an address that is none
├── TransportError              no answer came: no connection, or it broke
│   └── RequestTimeoutError     the server took longer than the timeout
├── StatusError                 the server answered with an error
│   ├── BadRequestError         400
│   ├── AuthenticationError     401
│   ├── PermissionDeniedError   403
│   ├── NotFoundError           404
│   ├── ConflictError           409
│   ├── PayloadTooLargeError    413
│   ├── UnprocessableError      422
│   ├── RateLimitedError        429
│   └── ServerError             500 and above
│       ├── UnavailableError    503
│       └── StorageFullError    507
├── ResponseError               an answer that the API does not promise
├── StreamError                 a stream that ended with an error, or too early
└── JobError                    a job that `wait` saw fail or be cancelled
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import httpx

    from tenora_client.models import JobState


class TenoraError(Exception):
    """Base of the tree; `message` is one sentence for the person who has to act on it."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


class ConfigurationError(TenoraError):
    """The client cannot be built: no key was found, or the address is malformed."""


class RequestError(TenoraError, ValueError):
    """The request cannot be sent: it holds what JSON has no form for, as NaN, infinity or half a surrogate pair."""


class TransportError(TenoraError):
    """No answer came.

    Attributes:
        sent: whether the server may have seen the request; False makes a retry safe for every request.
    """

    def __init__(self, message: str, *, sent: bool) -> None:
        super().__init__(message)
        self.sent = sent


class RequestTimeoutError(TransportError):
    """The server took longer than the timeout."""


class StatusError(TenoraError):
    """The server answered with an error.

    Attributes:
        status_code: HTTP status.
        type, code, param: as in the error body, `{"error": {message, type, code, param}}`; None where absent.
        request_id: the `x-request-id` of the answer, to quote in a report; None if there was none.
        retry_after: seconds after which a retry makes sense, or None.
        should_retry: False if the server said that a retry is pointless (`x-should-retry: false`).
    """

    def __init__(
        self,
        message: str,
        *,
        status_code: int,
        type: str | None = None,  # noqa: A002 - the wire's name
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status_code = status_code
        self.type = type
        self.code = code
        self.param = param
        self.request_id = request_id
        self.retry_after = retry_after
        self.should_retry = should_retry

    def __str__(self) -> str:
        suffix = f" [request {self.request_id}]" if self.request_id else ""
        return f"{self.message}{suffix}"


class BadRequestError(StatusError):
    """400: a field is missing, unknown or out of bounds; `param` names it."""


class AuthenticationError(StatusError):
    """401: no key, or one that is unknown, revoked or expired."""


class PermissionDeniedError(StatusError):
    """403: the key lacks the scope."""


class NotFoundError(StatusError):
    """404: no such thing for this tenant."""


class ConflictError(StatusError):
    """409: the thing is in a state that forbids the request; a retry will not help."""


class PayloadTooLargeError(StatusError):
    """413: the body is over the limit that the message names."""


class UnprocessableError(StatusError):
    """422: an upload's content is malformed, or an idempotency key was reused for another payload."""


class RateLimitedError(StatusError):
    """429: contended; `retry_after` says when to come back."""


class ServerError(StatusError):
    """500 and above: the server failed."""


class UnavailableError(ServerError):
    """503: no capacity now; `retry_after` says when to come back."""


class StorageFullError(ServerError):
    """507: the server's disk is full; nothing was stored."""


class ResponseError(TenoraError):
    """The answer is not what the API promises: is that address a Tenora server?"""


class StreamError(TenoraError):
    """A stream ended with an error event, or the connection ended before `[DONE]`.

    Attributes:
        type, code, param: as in the error event; None where absent.
        request_id: the `x-request-id` of the stream, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        type: str | None = None,  # noqa: A002 - the wire's name
        code: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.type = type
        self.code = code
        self.param = param
        self.request_id = request_id


class JobError(TenoraError):
    """A job that ended without an adapter; `job` is its last state, `job.error` says why."""

    def __init__(self, message: str, *, job: JobState) -> None:
        super().__init__(message)
        self.job = job


_BY_STATUS: dict[int, type[StatusError]] = {
    400: BadRequestError,
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    409: ConflictError,
    413: PayloadTooLargeError,
    422: UnprocessableError,
    429: RateLimitedError,
    503: UnavailableError,
    507: StorageFullError,
}


def error_fields(body: object) -> tuple[str | None, dict[str, str | None]]:
    """Message and `{type, code, param}` of an error body in the OpenAI shape; None for what is absent."""
    error = body.get("error") if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return None, {"type": None, "code": None, "param": None}
    fields = {key: str(error[key]) if error.get(key) is not None else None for key in ("type", "code", "param")}
    message = error.get("message")
    return (str(message) if message else None), fields


def status_error(response: httpx.Response) -> StatusError:
    """The error that a response with an error status stands for. Its body must have been read."""
    try:
        body: Any = json.loads(response.content)
    except ValueError:
        body = None
    message, fields = error_fields(body)
    status = response.status_code
    kind = _BY_STATUS.get(status, ServerError if status >= 500 else StatusError)
    should_retry = response.headers.get("x-should-retry")
    return kind(
        message or f"HTTP {status} from {response.request.method} {response.request.url.path}.",
        status_code=status,
        request_id=response.headers.get("x-request-id"),
        retry_after=_seconds(response.headers.get("retry-after")),
        should_retry=None if should_retry is None else should_retry.lower() == "true",
        **fields,
    )


def transport_error(error: httpx.HTTPError, *, url: str, sent: bool, timed_out: bool) -> TransportError:
    """The error that an httpx failure stands for; `sent` tells whether the server may have seen the request."""
    reason = str(error) or type(error).__name__
    if timed_out:
        return RequestTimeoutError(
            f"{url} did not answer in time ({reason}). Raise `timeout` if it needs longer.", sent=sent
        )
    if not sent:
        return TransportError(f"Cannot connect to {url} ({reason}). Is `tenora serve` running there?", sent=False)
    return TransportError(f"The connection to {url} broke before the answer was complete ({reason}).", sent=True)


def _seconds(value: str | None) -> float | None:
    """Retry-After in seconds; a date or nonsense counts as absent (our server sends seconds)."""
    try:
        seconds = float(value) if value is not None else None
    except ValueError:
        return None
    return seconds if seconds is not None and 0 <= seconds < float("inf") else None
