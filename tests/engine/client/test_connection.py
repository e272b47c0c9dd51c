"""A guest's connection to an engine: made again however it ends, and told apart from an engine that is not there."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tenora.engine.client import connection
from tenora.engine.client.connection import EngineConnection
from tenora.engine.client.link import encode
from tenora.unix_socket import MAX_MESSAGE, connect, listen, pack, read_message
from tests.support.patience import PATIENCE
from tests.support.scripted_engine import READY


class Guest:
    """A connection, and the door that it comes to."""

    def __init__(self, door: Path) -> None:
        self.door = door
        self.lost = 0
        self.connection = EngineConnection(door, on_event=lambda _: None, on_lost=self._lose)

    def _lose(self) -> None:
        self.lost += 1

    def come(self) -> None:
        self._coming = asyncio.create_task(self.connection.start(PATIENCE))

    async def leave(self) -> None:
        self._coming.cancel()
        await self.connection.close()

    async def let_in(self, listener: socket.socket) -> socket.socket:
        """The engine's end of the next connection, which has said that it is ready."""
        async with asyncio.timeout(PATIENCE):
            accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
            accepted.sendall(pack(encode(READY)))
            await self.connection.up.wait()
        return accepted


@pytest.fixture
async def guest() -> AsyncIterator[Guest]:
    with tempfile.TemporaryDirectory(dir="/tmp") as place:
        guest = Guest(Path(place) / "engine.sock")
        yield guest
        await guest.leave()


@pytest.mark.parametrize("end", ["closed", "reset", "nonsense"])
async def test_a_connection_that_ends_however_is_made_again_and_counted(guest: Guest, end: str) -> None:
    with listen(guest.door) as listener:
        guest.come()
        first = await guest.let_in(listener)
        if end == "reset":
            guest.connection._writer.write(b"never read")  # type: ignore[union-attr]
        if end == "nonsense":
            first.sendall((MAX_MESSAGE + 1).to_bytes(4, "big"))
        else:
            first.close()
        (await guest.let_in(listener)).close()
        first.close()
    assert guest.connection.ready == READY
    assert (guest.connection.restarts, guest.lost) == (1, 1)


async def test_an_engine_that_is_not_there_is_no_lost_connection_and_is_told_once(
    guest: Guest, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = asyncio.Semaphore(0)

    def counted(door: Path) -> socket.socket:
        tried.release()
        return connect(door)

    monkeypatch.setattr(connection, "connect", counted)
    caplog.set_level(logging.INFO)
    guest.come()
    for _ in range(3):
        await tried.acquire()
    with listen(guest.door) as listener:
        (await guest.let_in(listener)).close()
    assert (guest.connection.restarts, guest.lost) == (0, 0)
    assert [record.message for record in caplog.records] == [
        "no engine lets this process in: its owner starts one, or is gone"
    ]


async def test_a_connection_that_fails_in_any_way_is_at_its_end() -> None:
    reader = asyncio.StreamReader()
    reader.set_exception(OSError(errno.ENOBUFS, "No buffer space available"))
    assert await read_message(reader) is None
