"""A scripted server behind httpx.MockTransport, and clients that talk to it without sleeping."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx

from tenora_client import AsyncClient, Client

KEY = "tk-test-secret"
Answer = httpx.Response | Exception


class Script:
    """Answers requests in order and keeps them; an answer may be an exception to raise."""

    def __init__(self, *answers: Answer | Callable[[httpx.Request], Answer]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx.Request] = []
        self.bodies: list[bytes] = []
        self.slept: list[float] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        self.bodies.append(request.content)
        answer = self.answers.pop(0)
        answer = answer(request) if callable(answer) else answer
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self, **options: Any) -> Client:
        return Client(
            "http://tenora.test", KEY, transport=httpx.MockTransport(self), sleep=self.slept.append, **options
        )

    def async_client(self, **options: Any) -> AsyncClient:
        async def sleep(seconds: float) -> None:
            self.slept.append(seconds)

        return AsyncClient("http://tenora.test", KEY, transport=httpx.MockTransport(self), sleep=sleep, **options)

    def sent(self, index: int = -1) -> Any:
        """A request's JSON body."""
        return json.loads(self.bodies[index])


class Pieces(httpx.SyncByteStream, httpx.AsyncByteStream):
    """A response body that arrives in pieces; an exception among them is raised. `closed` tells whether it was left."""

    def __init__(self, *pieces: bytes | Exception) -> None:
        self.pieces = pieces
        self.given = 0
        self.closed = False

    def __iter__(self) -> Iterator[bytes]:
        for piece in self.pieces:
            self.given += 1
            if isinstance(piece, Exception):
                raise piece
            yield piece

    async def __aiter__(self) -> AsyncIterator[bytes]:
        for piece in self:
            yield piece

    def close(self) -> None:
        self.closed = True

    async def aclose(self) -> None:
        self.closed = True


def reply(body: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=body, headers={key.replace("_", "-"): value for key, value in headers.items()})


def failure(status: int, code: str = "some_code", **headers: str) -> httpx.Response:
    body = {"error": {"message": "It went wrong; do that.", "type": "some_type", "code": code, "param": "model"}}
    return reply(body, status, **headers)


def chunk(text: str) -> bytes:
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": None}
    body = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "choices": [choice]}
    return b"data: " + json.dumps(body, ensure_ascii=False).encode() + b"\n\n"


COMPLETION = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "pubmed",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4},
}
FILE = {
    "id": "file-1",
    "object": "file",
    "bytes": 3,
    "created_at": 1,
    "filename": "a.jsonl",
    "purpose": "fine-tune",
    "status": "processed",
}
ADAPTER = {
    "id": "adapter-1",
    "object": "adapter",
    "name": "pubmed",
    "tenant": "default",
    "version": 1,
    "digest": "ab12",
    "base_model": "smollm2-135m",
    "method": "lora",
    "rank": 16,
    "target_modules": ["q_proj"],
    "bytes": 9,
    "created_at": 1,
    "source": "upload",
    "job_id": None,
    "parent": "smollm2-135m",
    "resident": "disk",
    "pinned": False,
    "evaluation": None,
}
BASE_CARDS = {
    "object": "list",
    "data": [
        {"id": "pubmed", "object": "model", "created": 1, "owned_by": "default", "parent": "smollm2-135m"},
        {"id": "smollm2-135m", "object": "model", "created": 1, "owned_by": "tenora", "parent": None},
    ],
}


def job(status: str = "queued", **fields: Any) -> dict[str, Any]:
    return {
        "id": "ftjob-1",
        "object": "fine_tuning.job",
        "created_at": 1,
        "model": "smollm2-135m",
        "organization_id": "default",
        "result_files": [],
        "seed": 0,
        "status": status,
        "training_file": "file-1",
        "hyperparameters": {"n_epochs": "auto"},
        **fields,
    }


def event(number: int, level: str = "info", **metrics: float) -> dict[str, Any]:
    return {
        "id": f"ftevent-{number}",
        "object": "fine_tuning.job.event",
        "created_at": number,
        "level": level,
        "message": f"event {number}",
        "type": "metrics" if metrics else "message",
        "data": metrics,
    }


def page(*items: dict[str, Any], has_more: bool = False) -> dict[str, Any]:
    return {"object": "list", "data": list(items), "has_more": has_more}
