"""Streamed completions at little cost: one HTTP/1.1 connection per stream, events counted instead of parsed.

The load generator runs beside the server that it measures, often on the same cores. httpx takes about as long for an
event as a small model for a token; this takes a few microseconds.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from urllib.parse import urlsplit

import httptools

EVENT_END = b"\n\n"
DONE = b"data: [DONE]"


class EventCounter:
    """Counts the server-sent events of a byte stream that is cut anywhere, and keeps the last one's data.

    Events end with an empty line, LF only, as Tenora and vLLM write them. Comments, with which a server keeps a
    connection alive, are no events.
    """

    def __init__(self) -> None:
        self.done = False
        self.last = b""
        self.error = b""
        self._rest = b""

    def feed(self, chunk: bytes) -> int:
        """How many events other than `[DONE]` the chunk completes; an error event is kept, not counted."""
        *events, self._rest = (self._rest + chunk).split(EVENT_END)
        count = 0
        for event in events:
            if event == DONE:
                self.done = True
            elif event.startswith(b'data: {"error"'):
                self.error = event[6:]
            elif event.startswith(b"data: "):
                self.last = event[6:]
                count += 1
        return count


@dataclass(slots=True)
class Sample:
    """What became of one request. Times are `time.perf_counter` seconds.

    Attributes:
        sent: when it was written to the connection.
        arrivals: when each event with text came; several that came in one packet have one time.
        prompt_tokens, output_tokens: from the usage at the end of the stream.
        cached_tokens: of the prompt, found in the server's prefix cache.
        error: why it failed, or empty.
    """

    model: str
    group: str
    sent: float
    arrivals: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ended(self) -> float:
        """When its last event with text came."""
        return self.arrivals[-1] if self.arrivals else self.sent

    @property
    def first_token(self) -> float:
        """Seconds from sending to the first event with text."""
        return self.arrivals[0] - self.sent

    @property
    def per_token(self) -> float:
        """Mean seconds from one token to the next; 0 of a single token. However many share an event or a packet."""
        return (self.arrivals[-1] - self.arrivals[0]) / max(1, self.output_tokens - 1)

    @property
    def gaps(self) -> list[float]:
        """Seconds between neighbouring events; 0 between those of one packet."""
        return [late - early for early, late in zip(self.arrivals, self.arrivals[1:], strict=False)]


class Connection(asyncio.Protocol):
    """A keep-alive connection that does one request after another."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._counter = EventCounter()
        self._sample: Sample | None = None
        self._body: list[bytes] = []
        self._finished: asyncio.Future[None] | None = None

    # ---- asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio: the connection stands."""
        self._transport = transport  # type: ignore[assignment]  # a Transport, as for every stream protocol

    def data_received(self, data: bytes) -> None:
        """asyncio: bytes came."""
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._end(f"not HTTP: {error}")
            self.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """asyncio: the connection is gone."""
        self._end(f"the connection broke: {exc or 'closed by the server'}")
        self._transport = None

    # ---- the parser's side

    def on_body(self, body: bytes) -> None:
        """httptools: a piece of the body."""
        sample = self._sample
        if sample is None:
            return
        if self._parser.get_status_code() != 200:
            self._body.append(body)
            return
        count = self._counter.feed(body)
        if count:
            sample.arrivals += [perf_counter()] * count

    def on_message_complete(self) -> None:
        """httptools: the whole answer was read."""
        status = self._parser.get_status_code()
        if status != 200:
            self._end(f"HTTP {status}: {_message(b''.join(self._body))}")
        elif self._counter.error:
            self._end(_message(self._counter.error))
        elif not self._counter.done:
            self._end("the stream ended before [DONE]")
        else:
            self._finish()

    def _finish(self) -> None:
        sample = self._sample
        if sample is not None:
            usage = json.loads(self._counter.last).get("usage")
            if not usage:
                self._end("the stream did not end with its usage")
                return
            sample.arrivals.pop()  # the event of the usage
            sample.prompt_tokens = usage["prompt_tokens"]
            sample.output_tokens = usage["completion_tokens"]
            sample.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        self._end("")

    def _end(self, error: str) -> None:
        if self._sample is not None:
            self._sample.error = error
            self._sample = None
        if self._finished is not None and not self._finished.done():
            self._finished.set_result(None)

    # ---- the caller's side

    @property
    def open(self) -> bool:
        """Whether another request can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def close(self) -> None:
        """Close the connection."""
        if self._transport is not None:
            self._transport.close()

    async def send(self, request: bytes, sample: Sample) -> None:
        """Send one request and return when its answer was read or failed; `sample` then says which."""
        if self._transport is None:
            sample.error = "the connection is closed"
            return
        self._parser = httptools.HttpResponseParser(self)
        self._counter = EventCounter()
        self._body = []
        self._sample = sample
        self._finished = asyncio.get_running_loop().create_future()
        sample.sent = perf_counter()
        self._transport.write(request)
        await self._finished


def _message(body: bytes) -> str:
    """What an error answer says, in one line."""
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace") or "no message"


@dataclass(frozen=True, slots=True)
class Address:
    """Where the server is and how requests to it begin."""

    host: str
    port: int
    secure: bool
    head: bytes

    @classmethod
    def of(cls, url: str, key: str) -> Address:
        """The address of `POST {url}/v1/completions` with a key."""
        parts = urlsplit(url)
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        host = parts.hostname or "127.0.0.1"
        head = (
            f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"Authorization: Bearer {key}\r\nContent-Type: application/json\r\nAccept: text/event-stream\r\n"
        )
        return cls(host, port, secure, head.encode())

    def request(self, body: Mapping[str, Any]) -> bytes:
        """The bytes of one request."""
        text = json.dumps(body, separators=(",", ":")).encode()
        return self.head + f"Content-Length: {len(text)}\r\n\r\n".encode() + text

    async def connect(self) -> Connection:
        """A new connection; OSError if there is none to be had."""
        loop = asyncio.get_running_loop()
        context = ssl.create_default_context() if self.secure else None
        _, connection = await loop.create_connection(Connection, self.host, self.port, ssl=context)
        return connection
