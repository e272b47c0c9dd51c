"""The asynchronous client's connection: what is asked goes out, and what is answered comes in, here."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import httpx

from tenora_client.async_streams import AsyncStream
from tenora_client.calls import Call, OnBytes, get_bytes
from tenora_client.environment import resolve_key, resolve_url
from tenora_client.errors import TenoraError, status_error
from tenora_client.exchange import DEFAULT_LIMITS, DEFAULT_TIMEOUT, arriving, build_request, read_answer, translate
from tenora_client.retry import RetryPolicy
from tenora_client.version import __version__

T = TypeVar("T")


class AsyncConnection:
    """Sends calls to one server, again where that may help; the resources know nothing else of a client.

    What it is made of, and what it raises then: see `AsyncClient`.
    """

    def __init__(
        self,
        base_url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
        retries: RetryPolicy | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self.base_url = resolve_url(base_url)
        self.retries = retries or RetryPolicy()
        self.sleep = sleep
        self._http = httpx.AsyncClient(
            base_url=self.base_url,
            headers={"Authorization": f"Bearer {resolve_key(api_key)}", "User-Agent": f"tenora-client/{__version__}"},
            timeout=timeout,
            limits=DEFAULT_LIMITS,
            transport=transport,
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close all connections."""
        await self._http.aclose()

    async def ready(self) -> bool:
        """Whether the server takes requests now; False too if there is no server."""
        try:
            return (await self._http.get("/readyz", timeout=5.0)).is_success
        except httpx.TransportError:
            return False

    async def send(self, call: Call[T]) -> T:
        """Send a call and read its whole answer; every resource ends here.

        Raises:
            TransportError, StatusError, ResponseError: see `tenora_client.errors`.
        """
        response = await self._open(call, stream=False)
        return read_answer(call.answer, response)

    async def stream(self, call: Call[T]) -> AsyncStream[T]:
        """Send a call and give its answer event by event."""
        return AsyncStream(await self._open(call, stream=True), call.answer)

    async def download(self, path: str, target: Path, on_bytes: OnBytes | None = None) -> Path:
        """GET `path` into the file `target`, which appears only when it is complete; returns it."""
        response = await self._open(get_bytes(path), stream=True)
        try:
            with arriving(target) as file:
                total = int(response.headers.get("content-length", 0))
                async for chunk in response.aiter_bytes():
                    file.write(chunk)
                    if on_bytes is not None:
                        on_bytes(file.tell(), total)
        except httpx.HTTPError as error:
            raise translate(error, str(response.request.url)) from error
        finally:
            await response.aclose()
        return target

    async def content(self, path: str) -> bytes:
        """GET `path` into memory."""
        return (await self._open(get_bytes(path), stream=False)).content

    async def _open(self, call: Call[T], *, stream: bool) -> httpx.Response:
        """The first good response, after as many attempts as the policy allows. With `stream` its body is unread."""
        attempt = 0
        while True:
            try:
                return await self._attempt(call, stream=stream)
            except TenoraError as error:
                delay = self.retries.delay(attempt, error, idempotent=call.idempotent)
                if delay is None:
                    raise
            await self.sleep(delay)
            attempt += 1

    async def _attempt(self, call: Call[T], *, stream: bool) -> httpx.Response:
        with ExitStack() as files:
            request = build_request(self._http, call, files)
            try:
                response = await self._http.send(request, stream=stream)
                if not response.is_success:
                    await response.aread()
            except httpx.HTTPError as error:
                raise translate(error, str(request.url)) from error
        if not response.is_success:
            raise status_error(response)
        return response
