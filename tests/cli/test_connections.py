"""What anybody who reaches the port can do without a key, byte by byte, against the server that `serve` starts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import resource
from collections.abc import AsyncIterator

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from tenora.api import protocol
from tenora.api.connections import Connections, connection_limit

# The same service as the API's tests use.
from tests.api.conftest import Service, script, service, settings  # noqa: F401
from tests.cli.served import MIB, Port, served
from tests.support.patience import PATIENCE

REQUEST = b"GET /livez HTTP/1.1\r\nhost: t\r\n"


@pytest.fixture
async def port(service: Service) -> AsyncIterator[Port]:  # noqa: F811
    async with served(service) as port:
        yield port


async def test_one_header_line_without_an_end_stops_nobody(port: Port) -> None:
    wire = await port.connect()
    await wire.send(REQUEST + b"x: ")
    assert await wire.flood() <= 32 * MIB  # what fits into the sockets' buffers
    status, headers, body = await wire.answer()
    assert (status, body["error"]["code"]) == (431, "headers_too_large")
    assert headers["content-type"] == "application/json"
    assert await port.probe() == 200


@pytest.mark.parametrize(
    ("sent", "status", "code"),
    [
        (b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\nhost: t\r\n\r\n", 414, "uri_too_long"),
        (REQUEST + b"a: b\r\n" * 100 + b"\r\n", 431, "headers_too_large"),
        (REQUEST + (b"a: " + b"b" * 4000 + b"\r\n") * 20 + b"\r\n", 431, "headers_too_large"),
        (b"\r\n" * 50_000, 431, "headers_too_large"),
        (b"GET /livez HTTP/1.1\r\n\r\n", 400, "invalid_request"),
        (REQUEST + b"host: u\r\n\r\n", 400, "invalid_request"),
        (REQUEST + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", 400, "invalid_request"),
        (REQUEST + b"content-length: 1\r\ncontent-length: 1\r\n\r\n", 400, "invalid_request"),
        (REQUEST + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400, "invalid_request"),
        (REQUEST + b"content-length: -1\r\n\r\n", 400, "invalid_request"),
        (REQUEST + b"a b: c\r\n\r\n", 400, "invalid_request"),
        (b"GET /\xff HTTP/1.1\r\nhost: t\r\n\r\n", 400, "invalid_request"),
        (b"CONNECT t:80 HTTP/1.1\r\nhost: t\r\n\r\n", 400, "invalid_request"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400, "invalid_request"),
        (b"\x16\x03\x01\x02\x00\x01", 400, "invalid_request"),
    ],
)
async def test_what_is_no_bounded_request_is_told_so_in_the_shape_of_every_error(
    port: Port, sent: bytes, status: int, code: str
) -> None:
    wire = await port.connect()
    await wire.send(sent)
    answered, headers, body = await wire.answer()
    assert (answered, body["error"]["code"]) == (status, code)
    assert list(body["error"]) == ["message", "type", "code", "param"]
    assert headers["connection"] == "close"
    assert headers["x-request-id"].startswith("req_")
    assert await wire.reader.read() == b""


@pytest.mark.parametrize("endless", [b"1;", b"0\r\nx: "])
async def test_neither_a_trailer_nor_the_extension_of_a_chunk_goes_on_for_ever(port: Port, endless: bytes) -> None:
    wire = await port.connect()
    key = port.service.keys["default"]["infer"].encode()
    await wire.send(
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ntransfer-encoding: chunked\r\nauthorization: Bearer "
        + key
        + b"\r\n\r\n"
        + endless
    )
    assert await wire.flood() <= 32 * MIB
    assert await port.probe() == 200


async def test_headers_that_do_not_end_in_time_are_408_and_silence_is_cut_off(service: Service) -> None:  # noqa: F811
    places = Connections(100)
    async with served(service, connections=places) as port:
        slow = await port.connect()
        await port.probe()  # by when the server has taken the connection before
        served_by = type(next(iter(places._waiting)))
        served_by.head_seconds = 0.1  # type: ignore[attr-defined]  # it begins anew with a request's first byte
        silent = await port.connect()
        await slow.send(REQUEST)
        status, _, body = await slow.answer()
        assert (status, body["error"]["code"]) == (408, "request_timeout")
        await silent.closed()


async def test_the_probes_answer_beside_more_silent_connections_than_there_are_places(
    service: Service,  # noqa: F811
) -> None:
    async with served(service, connections=Connections(8)) as port:
        silent = [await port.connect() for _ in range(100)]
        for wire in silent[-4:]:
            await wire.send(REQUEST)
        assert await port.probe("/livez") == 200
        assert await port.probe("/readyz") == 200
        async with service.client() as client:
            assert (await client.get("/v1/models")).status_code == 200
        await silent[0].closed()  # those that waited longest have made room
        await silent[-1].send(b"\r\n")
        assert (await silent[-1].answer())[0] == 200


async def test_with_every_place_taken_by_a_request_only_the_probes_are_answered(
    service: Service,  # noqa: F811
) -> None:
    service.script.hold_after = 1
    headers = {"authorization": f"Bearer {service.keys['default']['infer']}"}
    base = service.control.inference.base_id
    chat = {"model": base, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
    async with (
        served(service, connections=Connections(4)) as port,
        httpx.AsyncClient(base_url=port.url, timeout=PATIENCE, headers=headers) as client,
    ):
        held = [asyncio.create_task(client.post("/v1/chat/completions", json=chat)) for _ in range(4)]
        await service.script.until(lambda: len(service.script.requests) == 4)
        refused = await client.get("/v1/models")
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "too_many_connections"
        assert refused.headers["retry-after"]
        assert await port.probe("/livez") == 200
        silent = [await port.connect() for _ in range(100)]
        assert await port.probe("/readyz") == 200
        service.script.hold_after = None
        await service.control.engine.evict("00")  # wakes the engine
        assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * 4
        for wire in silent:
            wire.writer.transport.abort()
        assert (await client.get("/v1/models")).status_code == 200


async def test_a_connection_beyond_every_place_is_closed_at_once(service: Service) -> None:  # noqa: F811
    service.script.hold_after = 1
    headers = {"authorization": f"Bearer {service.keys['default']['infer']}"}
    chat = {"model": service.control.inference.base_id, "messages": [{"role": "user", "content": "hi"}]}
    async with (
        served(service, connections=Connections(2, reserve=0)) as port,
        httpx.AsyncClient(base_url=port.url, timeout=PATIENCE, headers=headers) as client,
    ):
        held = [
            asyncio.create_task(client.post("/v1/chat/completions", json={**chat, "max_tokens": 3})) for _ in range(2)
        ]
        await service.script.until(lambda: len(service.script.requests) == 2)
        with pytest.raises(httpx.TransportError):
            await port.probe()
        service.script.hold_after = None
        await service.control.engine.evict("00")  # wakes the engine
        assert [answer.status_code for answer in await asyncio.gather(*held)] == [200] * 2
        assert await port.probe() == 200


async def test_no_more_requests_wait_on_one_connection_than_are_bounded(port: Port) -> None:
    wire = await port.connect()
    await wire.send((REQUEST + b"\r\n") * 2 * protocol.PIPELINED)  # in one piece: none is answered before all are read
    answered = b""
    with contextlib.suppress(ConnectionError):
        answered = await wire.reader.read()
    assert answered == b""
    assert await port.probe() == 200


async def test_a_connection_serves_one_request_after_another_as_before(port: Port) -> None:
    key = port.service.keys["default"]["infer"].encode()
    wire = await port.connect()
    chat = {"model": port.service.control.inference.base_id, "messages": [{"role": "user", "content": "hi"}]}
    body = json.dumps({**chat, "max_tokens": 2}).encode() + b" " * 200_000
    for _ in range(3):
        await wire.send(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\nauthorization: Bearer "
            + key
            + f"\r\ncontent-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        status, _, said = await wire.answer()
        assert (status, said["usage"]["completion_tokens"]) == (200, 2)
    await wire.send((REQUEST + b"\r\n") * 4 + REQUEST[:10])
    assert [(await wire.answer())[0] for _ in range(4)] == [200] * 4
    await wire.send(
        REQUEST[10:] + b"connection: upgrade, http2-settings\r\nupgrade: h2c\r\n\r\n"
    )  # as Java's client does
    assert (await wire.answer())[0] == 200


async def test_a_body_that_nobody_wants_does_not_keep_its_connection(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "REST_SECONDS", 0.1)
    wire = await port.connect()
    await wire.send(b"POST /v1/files HTTP/1.1\r\nhost: t\r\ncontent-length: 1000000\r\n\r\n")
    assert (await wire.answer())[0] == 401
    await wire.send(b"a")
    await wire.closed()


async def test_a_client_that_reads_no_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch, service: Service) -> None:  # noqa: F811
    monkeypatch.setattr(protocol, "STALL_SECONDS", 0.1)
    gone = asyncio.Event()

    async def endless(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        left = asyncio.create_task(receive())
        while not left.done():
            await send({"type": "http.response.body", "body": b"a" * MIB, "more_body": True})
            await asyncio.sleep(0)
        gone.set()

    service.app, app = endless, service.app  # type: ignore[assignment]  # any ASGI application will do
    async with served(service) as port:
        wire = await port.connect()
        await wire.send(REQUEST + b"\r\n")
        wire.reader._transport.pause_reading()  # type: ignore[attr-defined]  # nothing is taken from the socket
        async with asyncio.timeout(PATIENCE):
            await gone.wait()
    service.app = app


@pytest.mark.parametrize(
    ("soft", "hard", "wanted", "limit", "raised"),
    [
        (1024, 1_048_576, 4096, 4096, 65536),
        (1024, 4096, 4096, 3040, 4096),
        (256, 256, 4096, 160, 256),
        (1024, -1, 100, 100, 65536),
    ],
)
def test_the_bound_leaves_open_files_to_the_rest_of_the_process(
    monkeypatch: pytest.MonkeyPatch, soft: int, hard: int, wanted: int, limit: int, raised: int
) -> None:
    now = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda _: tuple(now))
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: now.__setitem__(slice(None), limits))
    assert connection_limit(wanted) == limit
    assert now == [raised, hard]
