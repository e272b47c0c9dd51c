"""Between a `Call` and httpx, for both clients: requests out, answers and errors in."""

from __future__ import annotations

import io
import math
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Final, TypeVar

import httpx
from pydantic import TypeAdapter, ValidationError

from tenora_client.calls import Call, OnBytes, Upload
from tenora_client.errors import RequestError, ResponseError, StreamError, TransportError, error_fields, transport_error

T = TypeVar("T")
DONE: Final = "[DONE]"
CONTENT_TYPES = {".json": "application/json", ".jsonl": "application/jsonl"}
DEFAULT_TIMEOUT = httpx.Timeout(connect=5.0, read=600.0, write=60.0, pool=None)
DEFAULT_LIMITS = httpx.Limits(max_connections=1024, max_keepalive_connections=64)
_UNSENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.UnsupportedProtocol)


class _CountedFile(io.FileIO):
    """A file that reports how far it has been read."""

    def __init__(self, path: Path, on_read: _Counter) -> None:
        super().__init__(path)
        self._on_read = on_read

    def read(self, size: int | None = -1, /) -> bytes:
        chunk = super().read(size) or b""
        self._on_read.add(len(chunk))
        return chunk


class _Counter:
    """Bytes of all files of one upload."""

    def __init__(self, total: int, on_bytes: OnBytes | None) -> None:
        self._done, self._total, self._on_bytes = 0, total, on_bytes

    def add(self, count: int) -> None:
        self._done += count
        if self._on_bytes is not None:
            self._on_bytes(self._done, self._total)


def build_request(http: httpx.Client | httpx.AsyncClient, call: Call[T], files: ExitStack) -> httpx.Request:
    """The request of one attempt; files of an upload are opened in `files` and read while it is sent."""
    headers = {"Idempotency-Key": call.idempotency_key} if call.idempotency_key else {}
    if call.upload is None:
        try:
            return http.build_request(call.method, call.path, params=dict(call.params), json=call.body, headers=headers)
        except ValueError as error:
            place = next(_unsendable(call.body, ""), None)
            if place is None:
                raise
            reason = "it is NaN, infinite or no UTF-8 text, which JSON does not have."
            raise RequestError(f"{place} cannot be sent: {reason}") from error
    parts = _open_parts(call.upload, files)
    return http.build_request(call.method, call.path, data=dict(call.upload.fields), files=parts, headers=headers)


def _unsendable(value: Any, place: str) -> Iterator[str]:
    """Where values are that JSON cannot carry, as `lora.alpha` or `messages[0].content`."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _unsendable(inner, f"{place}.{name}" if place else str(name))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _unsendable(inner, f"{place}[{index}]")
    elif not _is_sendable(value):
        yield place


def _is_sendable(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return not (isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value))


def _open_parts(upload: Upload, stack: ExitStack) -> dict[str, tuple[str, io.FileIO, str]]:
    counter = _Counter(sum(path.stat().st_size for path in upload.files.values()), upload.on_bytes)
    parts: dict[str, tuple[str, io.FileIO, str]] = {}
    for field, path in upload.files.items():
        kind = CONTENT_TYPES.get(path.suffix, "application/octet-stream")
        parts[field] = (path.name, stack.enter_context(_CountedFile(path, counter)), kind)
    return parts


def read_answer(answer: TypeAdapter[T], response: httpx.Response) -> T:
    """The typed answer.

    Raises:
        ResponseError: if the body is not what the API promises.
    """
    try:
        return answer.validate_json(response.content)
    except ValidationError as error:
        raise ResponseError(
            f"{response.request.url} answered {response.status_code} with a body that this client does not understand "
            f"({error.errors()[0]['msg']}). Is it a Tenora server of this version?"
        ) from error


def read_event(answer: TypeAdapter[T], data: str, request_id: str | None) -> T:
    """One event of a stream.

    Raises:
        StreamError: if it is an error event, or not what the API promises.
    """
    try:
        return answer.validate_json(data)
    except ValidationError as error:
        message, fields = _stream_failure(data)
        if message is None:
            message = f"The stream held an event that this client does not understand: {data[:200]!r}."
        raise StreamError(message, request_id=request_id, **fields) from (None if fields["type"] else error)


def _stream_failure(data: str) -> tuple[str | None, dict[str, str | None]]:
    try:
        return error_fields(TypeAdapter(dict[str, object]).validate_json(data))
    except ValidationError:
        return error_fields(None)


@contextmanager
def arriving(target: Path) -> Iterator[BinaryIO]:
    """A file to write a download to. It takes `target`'s place when the block ends well, and vanishes otherwise."""
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex}.part")
    try:
        with part.open("xb") as file:
            yield file
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def translate(error: httpx.HTTPError, url: str) -> TransportError:
    """The error of our tree that an httpx failure stands for."""
    sent = not isinstance(error, _UNSENT)
    return transport_error(error, url=url, sent=sent, timed_out=sent and isinstance(error, httpx.TimeoutException))


def truncated(request_id: str | None) -> StreamError:
    """The stream ended without `[DONE]`."""
    return StreamError(
        "The stream ended before it was complete; what came so far is not the whole answer.", request_id=request_id
    )
