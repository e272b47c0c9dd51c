"""Streamed answers: each event is parsed when it is asked for."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from types import TracebackType
from typing import Generic, Self, TypeVar

import httpx
from pydantic import TypeAdapter

from tenora_client.exchange import DONE, read_event, translate, truncated
from tenora_client.sse import EventParser

T = TypeVar("T")


class AsyncStream(Generic[T]):
    """An iterator over the chunks of one answer. Leaving it early (`async with`, `close`) tells the server to stop.

    Raises, while iterating:
        StreamError: an error event came, or the stream ended before `[DONE]`.
        TransportError: the connection broke.
    """

    def __init__(self, response: httpx.Response, answer: TypeAdapter[T]) -> None:
        self._response = response
        self._answer = answer
        self._events = self._read()
        self.request_id: str | None = response.headers.get("x-request-id")

    def __aiter__(self) -> AsyncIterator[T]:
        return self

    async def __anext__(self) -> T:
        return await anext(self._events)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connection if the answer is not complete; harmless otherwise."""
        await self._events.aclose()
        await self._response.aclose()

    async def _read(self) -> AsyncGenerator[T]:
        parser, done = EventParser(), False
        try:
            async for chunk in self._response.aiter_bytes():
                for data in parser.feed(chunk):
                    done = done or data == DONE
                    if not done:
                        yield read_event(self._answer, data, self.request_id)
        except httpx.HTTPError as error:
            raise translate(error, str(self._response.request.url)) from error
        finally:
            await self._response.aclose()
        if not done:
            raise truncated(self.request_id)
