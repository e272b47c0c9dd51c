"""Streamed answers: lazy, complete or an error, and left cleanly."""

from __future__ import annotations

import httpx
import pytest

import tenora_client as tc
from tests.client.fake import Pieces, Script, chunk, failure

MESSAGES = [{"role": "user", "content": "Hello?"}]
DONE = b"data: [DONE]\n\n"


def streaming(*pieces: bytes | Exception) -> tuple[Script, Pieces]:
    body = Pieces(*pieces)
    return Script(httpx.Response(200, stream=body, headers={"x-request-id": "req-1"})), body


def test_a_stream_gives_chunks_in_order_and_asks_for_one() -> None:
    whole = chunk("Hel") + chunk("lo 🙂") + DONE
    script, body = streaming(*(whole[i : i + 7] for i in range(0, len(whole), 7)))
    with script.client() as client, client.chat.create(MESSAGES, model="pubmed", stream=True) as stream:
        assert "".join(part.text for part in stream) == "Hello 🙂"
        assert stream.request_id == "req-1"
    assert script.sent()["stream"] is True
    assert body.closed


def test_nothing_is_read_before_it_is_asked_for() -> None:
    script, body = streaming(chunk("a"), chunk("b"), DONE)
    with script.client() as client, client.chat.create(MESSAGES, stream=True) as stream:
        assert body.given == 0
        assert next(stream).text == "a"
        assert body.given == 1
    assert body.closed  # left early: the server can stop


def test_an_error_event_is_an_error() -> None:
    error = (
        b'data: {"error": {"message": "The engine died.", "type": "server_error", "code": "service_unavailable"}}\n\n'
    )
    script, body = streaming(chunk("a"), error)
    with script.client() as client, pytest.raises(tc.StreamError, match="engine died") as raised:
        list(client.chat.create(MESSAGES, stream=True))
    assert (raised.value.code, raised.value.request_id) == ("service_unavailable", "req-1")
    assert body.closed


@pytest.mark.parametrize("ending", [b"", b"data: [DONE]"], ids=["nothing", "half an event"])
def test_a_stream_that_ends_early_is_not_taken_for_a_whole_one(ending: bytes) -> None:
    script, _ = streaming(chunk("a"), ending)
    with script.client() as client, pytest.raises(tc.StreamError, match="not the whole answer"):
        list(client.chat.create(MESSAGES, stream=True))


def test_a_connection_that_breaks_in_a_stream_is_an_error_and_no_retry() -> None:
    script, body = streaming(chunk("a"), httpx.ReadError("cut"))
    with script.client() as client, pytest.raises(tc.TransportError):
        list(client.chat.create(MESSAGES, stream=True))
    assert body.closed
    assert len(script.requests) == 1


def test_nonsense_in_a_stream_is_shown() -> None:
    script, _ = streaming(b"data: not json\n\n", DONE)
    with script.client() as client, pytest.raises(tc.StreamError, match="not json"):
        list(client.chat.create(MESSAGES, stream=True))


def test_an_error_before_the_stream_starts_is_a_status_error() -> None:
    script = Script(failure(404))
    with script.client() as client, pytest.raises(tc.NotFoundError):
        client.chat.create(MESSAGES, stream=True)


def test_usage_comes_with_a_chunk_without_choices() -> None:
    usage = b'data: {"id":"c","created":1,"model":"m","choices":[],'
    usage += b'"usage":{"prompt_tokens":1,"completion_tokens":2,"total_tokens":3}}\n\n'
    script, _ = streaming(chunk("a"), usage, DONE)
    with script.client() as client:
        parts = list(client.chat.create(MESSAGES, stream=True, stream_options={"include_usage": True}))
    assert [part.text for part in parts] == ["a", ""]
    assert parts[1].usage is not None


async def test_the_async_stream_likewise() -> None:
    script, body = streaming(chunk("a"), chunk("b"), DONE)
    async with script.async_client() as client:
        async with await client.chat.create(MESSAGES, stream=True) as stream:
            assert [part.text async for part in stream] == ["a", "b"]
        assert body.closed

    script, body = streaming(chunk("a"), chunk("b"), DONE)
    async with script.async_client() as client:
        async with await client.chat.create(MESSAGES, stream=True) as stream:
            assert (await anext(aiter(stream))).text == "a"
        assert body.closed
        assert body.given == 1

    script, _ = streaming(chunk("a"))
    async with script.async_client() as client:
        with pytest.raises(tc.StreamError):
            [part async for part in await client.chat.create(MESSAGES, stream=True)]
