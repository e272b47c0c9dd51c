"""A service of the API's tests behind the HTTP server that `serve` starts, and raw connections to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import httpx

from tenora.api.protocol import bounded
from tenora.cli.serving import Server, http_config, listening, url_of
from tests.api.conftest import Service
from tests.support.patience import PATIENCE

MIB = 2**20


@dataclass
class Wire:
    """One raw connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of the next answer."""
        head = (await self.reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        body = await self.reader.readexactly(int(headers["content-length"]))
        return int(head[0].split()[1]), headers, json.loads(body)

    async def flood(self) -> int:
        """Send up to 300 MiB of one letter, until the server answers or closes; how many bytes it took."""
        for sent in range(300):
            try:
                await self.send(b"a" * MIB)
            except ConnectionError:
                return sent * MIB
            if self.reader._buffer:  # type: ignore[attr-defined]  # something has come; reading it would wait for more
                return sent * MIB
        return 300 * MIB

    async def closed(self) -> None:
        """Wait until the server has ended the connection, in whatever way."""
        try:
            while await self.reader.read(2**16):
                pass
        except ConnectionError:
            return


@dataclass
class Port:
    """A served service."""

    service: Service
    url: str
    connect: Callable[[], Awaitable[Wire]]

    async def probe(self, path: str = "/livez") -> int:
        async with httpx.AsyncClient(base_url=self.url, timeout=PATIENCE) as client:
            return (await client.get(path)).status_code


@asynccontextmanager
async def served(service: Service, **bounds: Any) -> AsyncIterator[Port]:
    with listening(service.settings.model_copy(update={"port": 0})) as listener:
        config = http_config(service.app, service.settings.max_connections)
        if bounds:
            config.http = bounded(**bounds)
        server = Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        await server.ready.wait()
        writers: list[asyncio.StreamWriter] = []

        async def connect() -> Wire:
            reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
            writers.append(writer)
            return Wire(reader, writer)

        try:
            yield Port(service, url_of(listener), connect)
        finally:
            for writer in writers:
                writer.transport.abort()
            server.should_exit = True
            await serving
