"""Server-sent events, and what happens when somebody leaves: the client, the engine or the server."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from tenora.api import sse
from tests.api.asgi import Call
from tests.api.conftest import SPEECH, Service
from tests.support.patience import PATIENCE

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "Say it."}]


def events(text: str) -> list[Any]:
    """The data of each event; `[DONE]` as a string."""
    assert text.endswith("\n\n")
    data = [line.removeprefix("data: ") for line in text.removesuffix("\n\n").split("\n\n")]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


async def test_chat_chunks(service: Service, base_id: str) -> None:
    body = {"model": base_id, "messages": HELLO, "max_tokens": 5, "n": 2, "stream": True}
    response = await service.client("infer").post(CHAT, json={**body, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    *chunks, usage, done = events(response.text)
    assert done == "[DONE]"
    assert [chunk["choices"][0]["delta"] for chunk in chunks[:2]] == [{"role": "assistant", "content": ""}] * 2
    texts = {0: "", 1: ""}
    for chunk in chunks:
        [choice] = chunk["choices"]
        texts[choice["index"]] += choice["delta"].get("content", "")
        assert (chunk["object"], chunk["model"], chunk["id"]) == ("chat.completion.chunk", base_id, chunks[0]["id"])
    assert texts[0] == texts[1] != ""
    assert SPEECH.startswith(texts[0])
    ends = [choice for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert [(end["delta"], end["finish_reason"]) for end in ends] == [({}, "length")] * 2
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 10


async def test_streamed_logprobs(service: Service) -> None:
    body = {
        "model": service.control.inference.base_id,
        "messages": HELLO,
        "max_tokens": 3,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 1,
    }
    response = await service.client("infer").post(CHAT, json=body)
    tokens = [
        entry["token"]
        for chunk in events(response.text)[:-1]
        for entry in ((chunk["choices"][0]["logprobs"] or {}).get("content") or [])
    ]
    assert SPEECH.startswith("".join(tokens))
    assert len(tokens) == 3


async def test_an_error_after_the_start_is_an_event_and_the_end(service: Service) -> None:
    service.script.fail_after = 2
    response = await service.client("infer").post(
        CHAT, json={"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 9, "stream": True}
    )
    assert response.status_code == 200
    *chunks, last = events(response.text)
    assert chunks
    assert set(last) == {"error"}
    assert set(last["error"]) == {"message", "type", "code", "param"}
    assert "[DONE]" not in response.text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_aborts_its_generation(service: Service, stream: bool, n: int) -> None:
    service.script.hold_after = 2
    call = Call(
        service,
        CHAT,
        {"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 100, "stream": stream, "n": n},
    )
    await service.script.until(lambda: len(service.script.requests) == n)
    if stream:
        await call.until(lambda: "content" in call.text)
    assert service.script.aborted == []
    call.leave()
    await call.finished()
    await service.script.until(lambda: len(service.script.aborted) == n)
    assert service.app.state.lifecycle.open == 0
    assert sorted(service.script.aborted) == sorted(request.request_id for request in service.script.requests)


async def test_a_client_that_leaves_several_prompts_aborts_them_all(service: Service) -> None:
    service.script.hold_after = 1
    call = Call(
        service,
        "/v1/completions",
        {"model": service.control.inference.base_id, "prompt": ["a", "b", "c"], "max_tokens": 100, "stream": True},
    )
    await service.script.until(lambda: len(service.script.requests) == 3)
    call.leave()
    await call.finished()
    await service.script.until(lambda: len(service.script.aborted) == 3)


async def test_a_client_that_leaves_before_the_first_token(service: Service) -> None:
    service.script.hold_after = 0
    call = Call(service, CHAT, {"model": service.control.inference.base_id, "messages": HELLO, "stream": True})
    await service.script.until(lambda: len(service.script.requests) == 1)
    call.leave()
    await call.finished()
    await service.script.until(lambda: len(service.script.aborted) == 1)


async def test_a_client_that_stops_reading_is_cut_off(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse.EventStream.__init__, "__defaults__", (0.05,))
    service.script.hold_after = 3
    call = Call(
        service,
        CHAT,
        {"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 100, "stream": True},
    )
    await call.until(lambda: "content" in call.text)
    call.stalled.set()
    service.script.hold_after = 6
    await service.control.engine.evict("00")  # any command wakes the engine's loop
    await call.finished()
    await service.script.until(lambda: len(service.script.aborted) == 1)


async def test_a_stream_sets_no_timer_for_each_event(
    service: Service, base_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A timeout around each event was most of what an event cost."""
    loop, timers = asyncio.get_running_loop(), []
    call_at = loop.call_at

    def counted(*args: Any, **given: Any) -> asyncio.TimerHandle:
        timers.append(args)
        return call_at(*args, **given)

    monkeypatch.setattr(loop, "call_at", counted)
    counts = []
    for tokens in (2, 200):
        timers.clear()
        asked = {"model": base_id, "messages": HELLO, "max_tokens": tokens, "stream": True}
        call = Call(service, CHAT, asked)
        await call.task
        assert events(call.text)[-1] == "[DONE]"
        counts.append(len(timers))
    assert counts[1] <= counts[0] + 5


async def test_a_completed_request_aborts_nothing(service: Service) -> None:
    await service.client("infer").post(
        CHAT, json={"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 3}
    )
    await service.client("infer").post(
        CHAT, json={"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 3, "stream": True}
    )
    assert service.script.aborted == []


async def test_drain_lets_open_streams_finish_and_refuses_new_ones(service: Service) -> None:
    service.script.hold_after = 2
    lifecycle = service.app.state.lifecycle
    call = Call(
        service, CHAT, {"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 5, "stream": True}
    )
    await call.until(lambda: "content" in call.text)
    lifecycle.begin_drain()
    service.control.begin_drain()
    client = service.client()
    assert (await client.get("/readyz")).status_code == 503
    assert (await client.get("/livez")).status_code == 200
    refused = await client.post(CHAT, json={"model": service.control.inference.base_id, "messages": HELLO})
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "shutting_down"
    assert refused.headers["retry-after"]
    waiting = asyncio.create_task(lifecycle.drained(PATIENCE))
    service.script.hold_after = None
    await service.control.engine.evict("00")
    await call.finished()
    assert events(call.text)[-1] == "[DONE]"
    assert await waiting is True


@pytest.mark.parametrize("stream", [True, False])
async def test_what_outlasts_the_grace_ends_with_an_error(service: Service, stream: bool) -> None:
    service.script.hold_after = 2
    lifecycle = service.app.state.lifecycle
    call = Call(
        service,
        CHAT,
        {"model": service.control.inference.base_id, "messages": HELLO, "max_tokens": 100, "stream": stream},
    )
    await service.script.until(lambda: len(service.script.requests) == 1)
    if stream:
        await call.until(lambda: "content" in call.text)
    lifecycle.begin_drain()
    assert await lifecycle.drained(0.01) is False
    await call.finished()
    if stream:
        assert events(call.text)[-1]["error"]["code"] == "shutting_down"
    else:
        assert call.status == 503
    await service.script.until(lambda: len(service.script.aborted) == 1)
    await lifecycle.idle()
