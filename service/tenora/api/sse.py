"""Working for a client only as long as it is there: a disconnect ends the work, and so does the end of the grace."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from tenora.aclosing import aclosing
from tenora.api import errors
from tenora.api.lifecycle import Lifecycle

T = TypeVar("T")
STALL_SECONDS = 60.0  # a reader that takes nothing for this long is cut off

log = logging.getLogger(__name__)


async def while_connected(work: Coroutine[Any, Any, T], receive: Receive, lifecycle: Lifecycle) -> T:
    """The result of `work`, which is cancelled (and awaited) if nobody is left to have it.

    The request's body must have been read: the next thing that `receive` gives is the disconnect.

    Raises:
        ClientGoneError: the client closed the connection.
        UnavailableError: the server's grace is over.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    expired = asyncio.create_task(lifecycle.expired.wait())
    try:
        await asyncio.wait({task, gone, expired}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            gone.result()
            raise errors.ClientGoneError
        raise lifecycle.shutting_down()
    finally:
        for each in (task, gone, expired):
            each.cancel()
        await asyncio.gather(task, gone, expired, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _StalledError(Exception):
    """The client does not take what is sent to it."""


class EventStream(Response):
    """Server-sent events: `data: {…}` for each item, then `data: [DONE]`.

    The status line waits for the first item, so that an error before it is an ordinary error answer. An error after it
    is the event `{"error": …}` and the end of the stream, without `[DONE]`.

    Args:
        begin: gives the JSON texts. The generator is closed when the stream ends, however it ends.
        lifecycle: tells when the server's grace is over.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        begin: Callable[[], Awaitable[AsyncIterator[str]]],
        lifecycle: Lifecycle,
        stall_seconds: float = STALL_SECONDS,
    ) -> None:
        # x-accel-buffering: nginx would hold events back otherwise.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.begin = begin
        self.lifecycle = lifecycle
        self.stall_seconds = stall_seconds
        self.started = False
        self._sending_since: float | None = None  # on the monotonic clock; None while nothing is being sent

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve the stream over one ASGI connection."""
        try:
            await while_connected(self._write(send), receive, self.lifecycle)
        except errors.ClientGoneError:
            if not self.started:
                raise
        except _StalledError:
            log.warning("a client stopped reading its stream and was cut off")
        except Exception as error:
            if not self.started:
                raise
            await self._break_off(scope, send, error)

    async def _write(self, send: Send) -> None:
        async with self._reader_watched(), aclosing(await self.begin()) as items:
            async for item in items:
                if not self.started:
                    await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    self.started = True
                await self._event(send, item, more=True)
            await self._event(send, "[DONE]", more=False)

    async def _break_off(self, scope: Scope, send: Send, error: Exception) -> None:
        known = errors.as_tenora_error(error)
        if known is None:
            log.error("a stream broke off", exc_info=error)
            body = errors.internal_error_body(scope["state"]["request_id"])
        else:
            body = errors.error_body(known)
        scope["state"]["error_code"] = body["error"]["code"]
        async with self._reader_watched():
            await self._event(send, errors.to_json(body), more=False)

    async def _event(self, send: Send, text: str, *, more: bool) -> None:
        await self._send(send, {"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

    async def _send(self, send: Send, message: Message) -> None:
        self._sending_since = time.monotonic()
        await send(message)
        self._sending_since = None

    @asynccontextmanager
    async def _reader_watched(self) -> AsyncIterator[None]:
        """Cut the block off if one message is not taken for `stall_seconds`.

        One timer for the whole stream, set again when it goes off: one for each message cost more than the message.
        """
        loop = asyncio.get_running_loop()
        timer: asyncio.TimerHandle

        def look() -> None:
            nonlocal timer
            taken = 0.0 if self._sending_since is None else time.monotonic() - self._sending_since
            if taken >= self.stall_seconds:
                deadline.reschedule(loop.time())
            else:
                timer = loop.call_later(self.stall_seconds - taken, look)

        timer = loop.call_later(self.stall_seconds, look)
        try:
            async with asyncio.timeout(None) as deadline:
                yield
        except TimeoutError:
            if deadline.expired():
                raise _StalledError from None
            raise
        finally:
            timer.cancel()
