"""Bounds on what arrives slowly, and on how much."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest
from starlette.types import Message, Receive, Scope, Send

from tenora.api import middleware
from tenora.api.errors import SlowRequestError
from tenora.api.middleware import BodyLimit
from tenora.config import Settings
from tests.api.asgi import Call
from tests.api.conftest import Service
from tests.support.clock import Clock, JumpingLoop


async def test_a_body_that_never_comes_is_408(service: Service) -> None:
    impatient = BodyLimit(service.app, service.settings, seconds=0.05)
    service.app, inner = impatient, service.app  # type: ignore[assignment]  # any ASGI application will do
    call = Call(service, "/v1/chat/completions", b'{"messages": ')
    await call.finished()
    service.app = inner
    assert call.status == 408
    assert dict(call.sent[0]["headers"])[b"connection"] == b"close"


def test_a_slow_answer_is_no_slow_body(settings: Settings) -> None:
    """Once the body is there, only the disconnect is waited for, as long as it takes."""
    clock, body = Clock(), [{"type": "http.request", "body": b"{}", "more_body": False}]
    heard: list[str] = []

    async def receive() -> Message:
        if body:
            return body.pop()
        await asyncio.sleep(1000 * middleware.BODY_SECONDS)
        return {"type": "http.disconnect"}

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        heard.extend([(await receive())["type"] for _ in range(2)])

    async def send(message: Message) -> None:
        """Nothing is sent."""

    limit = BodyLimit(application, settings)
    with asyncio.Runner(loop_factory=lambda: JumpingLoop(clock)) as runner:
        runner.run(limit({"type": "http", "path": "/v1/chat/completions", "headers": []}, receive, send))
    assert heard == ["http.request", "http.disconnect"]
    assert clock.now >= 1000 * middleware.BODY_SECONDS


async def test_a_body_that_trickles_is_not_waited_for_to_its_end(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One byte before each silence would be too long, for ever, used to hold a request for as long as one likes."""
    clock = 0.0
    monkeypatch.setattr(middleware, "time", SimpleNamespace(monotonic=lambda: clock))
    answers: list[Message] = []

    async def trickle() -> Message:
        nonlocal clock
        clock += 30.0
        return {"type": "http.request", "body": b" ", "more_body": True}

    async def send(message: Message) -> None:
        answers.append(message)

    async def application(scope: Scope, receive: Receive, send: Send) -> None:
        while (await receive())["more_body"]:
            assert clock < 1000

    limit = BodyLimit(application, service.settings)
    with pytest.raises(SlowRequestError, match="bytes a second"):
        await limit({"type": "http", "path": "/v1/chat/completions", "headers": []}, trickle, send)
    assert 60 <= clock <= 120
