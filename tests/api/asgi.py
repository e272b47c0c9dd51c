"""Calls the application by hand, where a test must decide when the client leaves or stops reading."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from starlette.types import Message

from tests.api.conftest import Service
from tests.support.patience import PATIENCE


class Call:
    """One request. `leave()` closes the client's end; `stalled` makes `send` block as a full socket does."""

    def __init__(
        self,
        service: Service,
        path: str,
        body: dict[str, Any] | bytes,
        *,
        scope: str = "infer",
        kind: str = "application/json",
    ) -> None:
        self.service = service
        self.sent: list[Message] = []
        self.stalled = asyncio.Event()
        self.gone = asyncio.Event()
        self.changed = asyncio.Condition()
        # Bytes are the beginning of a body whose end never comes.
        self._complete = not isinstance(body, bytes)
        self._body: list[bytes] = [body if isinstance(body, bytes) else json.dumps(body).encode()]
        self._scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": "POST",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "scheme": "http",
            "headers": [
                (b"authorization", f"Bearer {service.keys['default'][scope]}".encode()),
                (b"content-type", kind.encode()),
            ],
            "client": ("127.0.0.1", 1),
            "server": ("tenora.test", 80),
        }
        self.task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        await self.service.app(self._scope, self._receive, self._send)

    async def _receive(self) -> Message:
        if self._body:
            return {"type": "http.request", "body": self._body.pop(), "more_body": not self._complete}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        if self.stalled.is_set():
            await asyncio.Event().wait()
        self.sent.append(message)
        async with self.changed:
            self.changed.notify_all()

    def leave(self) -> None:
        self.gone.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for something to be true of what was sent."""
        async with asyncio.timeout(PATIENCE), self.changed:
            await self.changed.wait_for(condition)

    async def finished(self) -> None:
        async with asyncio.timeout(PATIENCE):
            await self.task

    @property
    def text(self) -> str:
        return b"".join(message.get("body", b"") for message in self.sent).decode()

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None
