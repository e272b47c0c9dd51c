# Made of async_streams.py by scripts/unasync.py (`make client`): change that one.
"""Streamed answers: each event is parsed when it is asked for."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import httpx
from pydantic import TypeAdapter

from tenora_client.exchange import DONE, read_event, translate, truncated
from tenora_client.sse import EventParser

T = TypeVar("T")


class Stream(Generic[T]):
    """An iterator over the chunks of one answer. Leaving it early (`with`, `close`) tells the server to stop.

    Raises, while iterating:
        StreamError: an error event came, or the stream ended before `[DONE]`.
        TransportError: the connection broke.
    """

    def __init__(self, response: httpx.Response, answer: TypeAdapter[T]) -> None:
        self._response = response
        self._answer = answer
        self._events = self._read()
        self.request_id: str | None = response.headers.get("x-request-id")

    def __iter__(self) -> Iterator[T]:
        return self

    def __next__(self) -> T:
        return next(self._events)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection if the answer is not complete; harmless otherwise."""
        self._events.close()
        self._response.close()

    def _read(self) -> Generator[T]:
        parser, done = EventParser(), False
        try:
            for chunk in self._response.iter_bytes():
                for data in parser.feed(chunk):
                    done = done or data == DONE
                    if not done:
                        yield read_event(self._answer, data, self.request_id)
        except httpx.HTTPError as error:
            raise translate(error, str(self._response.request.url)) from error
        finally:
            self._response.close()
        if not done:
            raise truncated(self.request_id)
