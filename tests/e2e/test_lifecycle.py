"""A graceful end, and a start on what was there."""

from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

import tenora_client as tc
from tests.e2e.conftest import StartServer
from tests.e2e.material import ask, write_adapter, write_rows
from tests.e2e.serving import stopped, unfinished_request, until

STREAMS = 20
TOKENS = 400


async def read(stream: tc.AsyncStream[tc.ChatChunk], started: asyncio.Event) -> tuple[int, str | None]:
    """Read a stream to its end; the number of chunks with text, and the finish_reason."""
    pieces, reason = 0, None
    async with stream:
        async for chunk in stream:
            started.set()
            for choice in chunk.choices:
                pieces += bool(choice.delta.content)
                reason = choice.finish_reason or reason
    return pieces, reason


@pytest.mark.full  # and quickly by tests/cli/test_serve.py
async def test_sigterm_lets_open_streams_finish(new_server: StartServer, long_base: Path) -> None:
    server = new_server(long_base, TENORA_DRAIN_SECONDS="3600", TENORA_ENGINE_HANG_SECONDS="3600")
    server.start()
    async with server.async_client() as client:
        started = [asyncio.Event() for _ in range(STREAMS)]

        async def one(number: int) -> tuple[int, str | None]:
            stream = await client.chat.create(
                ask(f"Question {number}?"), long_base.name, stream=True, max_tokens=TOKENS, ignore_eos=True
            )
            return await read(stream, started[number])

        readers = [asyncio.create_task(one(number)) for number in range(STREAMS)]
        await asyncio.gather(*(event.wait() for event in started))
        # Neither the streams nor the drain can end while it is looked at, however slowly that goes.
        with stopped(server.engine()), unfinished_request(server.url, server.key()):
            server.terminate()
            await asyncio.to_thread(until, lambda: server.probe("/readyz") == 503, "readyz says 503")
            assert await asyncio.to_thread(server.probe, "/livez") == 200
            with pytest.raises(tc.UnavailableError):
                await client.chat.create(ask("Too late?"), long_base.name, max_tokens=1)
        results = await asyncio.gather(*readers)
    assert {reason for _, reason in results} == {"length"}
    assert all(pieces > 1 for pieces, _ in results)
    assert server.exit_status() == 0


@pytest.mark.full
async def test_a_stream_longer_than_the_grace_ends_with_an_error_event(
    new_server: StartServer, long_base: Path
) -> None:
    server = new_server(long_base, TENORA_DRAIN_SECONDS="1")
    server.start()
    async with server.async_client() as client:
        stream = await client.chat.create(
            ask("Question?"), long_base.name, stream=True, max_tokens=3500, ignore_eos=True
        )
        await anext(aiter(stream))
        with stopped(server.engine()):
            server.terminate()
            with pytest.raises(tc.StreamError) as raised:
                [chunk async for chunk in stream]
        assert raised.value.code == "shutting_down"
    assert server.exit_status() == 0


@pytest.mark.full  # an idle server and one that drains are in tests/cli/test_serve.py
def test_a_second_sigterm_ends_at_once(new_server: StartServer, long_base: Path) -> None:
    server = new_server(long_base, TENORA_DRAIN_SECONDS="600")
    server.start()
    with server.client() as client:
        stream = client.chat.create(ask("Question?"), long_base.name, stream=True, max_tokens=3900, ignore_eos=True)
        next(stream)
        with stopped(server.engine()):
            server.terminate()
            until(lambda: server.probe("/readyz") == 503, "readyz says 503")
            server.terminate()
            server.exit_status()
        with pytest.raises((tc.StreamError, tc.TransportError)):
            list(stream)


def test_a_restart_keeps_everything(new_server: StartServer, tiny_base: Path, tmp_path: Path) -> None:
    server = new_server()
    server.start()
    key = server.key()
    server.command("tenants", "create", "acme")
    theirs = server.new_key("acme", "infer", "train", "adapters")
    with server.client() as client, server.client(theirs) as tenant:
        client.adapters.import_("desk", write_adapter(tmp_path / "v1", tiny_base, seed=1))
        client.adapters.import_("desk", write_adapter(tmp_path / "v2", tiny_base, seed=2))
        client.adapters.rollback("desk", 1)
        client.adapters.pin("desk")
        file = client.files.upload(write_rows(tmp_path / "rows.jsonl", 16))
        client.jobs.create(file, name="trained", hyperparameters={"n_epochs": 1}).wait(poll=0.2)
        paused = client.jobs.create(file, name="later", hyperparameters={"n_epochs": 50, "batch_size": 1})
        until(lambda: client.jobs.get(paused.id).status == "running", "the second job runs")
        paused.pause()
        until(lambda: client.jobs.get(paused.id).status == "paused", "the second job is paused")
        tenant.adapters.import_("desk", write_adapter(tmp_path / "theirs", tiny_base, seed=3))
        before = [picture(client), picture(tenant)]

    server.terminate()
    assert server.exit_status() == 0
    server.start()
    assert server.key() == key
    with server.client() as client, server.client(theirs) as tenant:
        assert [picture(client), picture(tenant)] == before
        assert client.files.content(file.id) == (tmp_path / "rows.jsonl").read_bytes()
        assert client.jobs.resume(paused.id).status in {"queued", "running"}
        assert client.jobs.cancel(paused.id).id == paused.id
        until(lambda: client.jobs.get(paused.id).status == "cancelled", "the resumed job is cancelled")


def picture(client: tc.Client) -> dict[str, object]:
    """All that a tenant sees, and what its adapters say."""
    adapters = [adapter.model_dump(exclude={"resident"}) for adapter in client.adapters.list()]
    names = [str(adapter["name"]) for adapter in adapters]
    return {
        "adapters": adapters,
        "versions": [
            [version.model_dump(exclude={"resident"}) for version in client.adapters.versions(name)] for name in names
        ],
        "models": [model.model_dump() for model in client.models.list()],
        "files": [one.model_dump() for one in client.files.list()],
        "jobs": [job.model_dump() for job in client.jobs.list()],
        "events": [[event.model_dump() for event in job.events(limit=100)] for job in client.jobs.list()],
        "said": [
            client.chat.create(ask("Question 1?"), name, temperature=0.0, max_tokens=16, ignore_eos=True).text
            for name in names
        ],
    }


def test_a_port_in_use_is_one_clear_line(new_server: StartServer) -> None:
    server = new_server()
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server.launch(port)
        assert server.exit_status() == 1
    assert f"port {port}" in server.tail()
    assert "Traceback" not in server.tail()
