"""What a token costs the API process: from the engine's frame to the socket, over the real application and server."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import tempfile
import time
from asyncio.subprocess import Process
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn
import uvloop
from fastapi import FastAPI
from starlette.types import Message

from tenora.api.app import create_app
from tenora.config import Settings
from tenora.control.control import Control
from tenora.engine.messages import Command, Event, FinishReason, Generate, Outputs, Ready, SequenceOutput
from tenora.model.catalog import resolve_model
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tests.support.tiny import build_tiny

try:
    from tenora.engine.client.client import AsyncEngine
    from tenora.engine.client.link import decode_event, encode
except ModuleNotFoundError:  # an older checkout, where the client was two modules
    from tenora.engine.link import decode_event, encode  # type: ignore[import-not-found, no-redef]

    from tenora.engine.client import AsyncEngine  # type: ignore[attr-defined, no-redef]

PATH = "/v1/chat/completions"
STREAMS, TOKENS = 32, 150
PAUSE = 0.003  # between two steps, as between those of a model: everybody has had the last token
TEXT = "The quick brown fox jumps over the lazy dog, and nobody asks why it is in such a hurry today. "


class Frames:
    """A line to an engine that is this process: a step's outputs are one frame, as on the socket."""

    def __init__(self) -> None:
        self.requests: list[str] = []
        self.complete = asyncio.Event()  # everybody has asked
        self._on_event: Callable[[Event], None] = lambda _: None

    async def open(self, on_event: Callable[[Event], None]) -> None:
        """The engine is ready at once."""
        self._on_event = on_event
        ready = Ready(
            device="cpu", dtype="float32", max_model_len=2048, kv_blocks=9, block_size=16, target_modules=("q_proj",)
        )
        self.deliver(encode(ready))

    def send(self, command: Command) -> None:
        """Generations are noted; all begin together."""
        if isinstance(command, Generate):
            self.requests.append(command.request_id)
            if len(self.requests) == STREAMS:
                self.complete.set()

    async def closed(self) -> str:
        """It never ends by itself."""
        await asyncio.Event().wait()
        return ""

    def kill(self) -> None:
        """There is nothing to end."""

    def deliver(self, frame: bytes) -> None:
        """A frame has come."""
        self._on_event(decode_event(frame))


CLIENT = """
import json, selectors, socket, sys
port, key, streams, body = json.loads(sys.argv[1])
selector = selectors.DefaultSelector()
for _ in range(streams):
    head = f"POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nAuthorization: Bearer {key}\\r\\n"
    head += f"Connection: close\\r\\nContent-Type: application/json\\r\\nContent-Length: {len(body)}\\r\\n\\r\\n"
    connection = socket.create_connection(("127.0.0.1", port))
    connection.sendall(f"{head}{body}".encode())
    selector.register(connection, selectors.EVENT_READ, [])
answers = []
while selector.get_map():
    for found, _ in selector.select():
        data = found.fileobj.recv(65536)
        found.data.append(data)
        if not data:
            selector.unregister(found.fileobj)
            answers.append(b"".join(found.data))
sys.exit(not all(answer.startswith(b"HTTP/1.1 200") and b"length" in answer for answer in answers))
"""


@asynccontextmanager
async def serving(home: Path, frames: Frames) -> AsyncIterator[tuple[FastAPI, str, Control]]:
    """The application over an engine that is `frames`, a key, and what is behind it."""
    base = build_tiny(home / "base", "smollm2")
    settings = Settings(home=home / "home", device="cpu", port=0, threads=1, log_level="warning")
    engine = AsyncEngine(settings, Path(), link=lambda: frames)
    await engine.start()
    tokenizer, spec = Tokenizer.load(base), ModelSpec.from_directory(base)
    model = resolve_model(str(base), settings.root)
    control = await Control.open(settings, engine, tokenizer, model, table_rows(spec))
    await control.start()
    tenant = await control.tenants.get("default")
    _, key = await control.keys.create(tenant.id, ["infer"])
    yield create_app(control, settings), key, control
    await control.close()
    await engine.close(0)


class Application:
    """Requests that come without a server: what is sent goes nowhere."""

    def __init__(self, app: FastAPI, key: str, body: bytes) -> None:
        self._tasks = [asyncio.create_task(self._ask(app, key, body)) for _ in range(STREAMS)]

    async def _ask(self, app: FastAPI, key: str, body: bytes) -> bool:
        bodies, last = [body], b""
        forever = asyncio.Event()

        async def receive() -> Message:
            if bodies:
                return {"type": "http.request", "body": bodies.pop(), "more_body": False}
            await forever.wait()
            return {"type": "http.disconnect"}

        async def send(message: Message) -> None:
            nonlocal last
            last = message.get("body", b"")

        headers = [(b"authorization", f"Bearer {key}".encode()), (b"content-type", b"application/json")]
        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": PATH, "raw_path": PATH.encode()}
        more = {"query_string": b"", "root_path": "", "scheme": "http", "client": None, "server": None}
        await app({**scope, **more, "asgi": {"version": "3.0"}, "headers": headers}, receive, send)
        return b"DONE" in last or b"length" in last

    async def wait(self) -> bool:
        """Whether one of them did not come to its end."""
        return not all(await asyncio.gather(*self._tasks))


class Server(uvicorn.Server):
    """The server, without signals."""

    def __init__(self, app: FastAPI) -> None:
        super().__init__(uvicorn.Config(app, loop="none", http="httptools", lifespan="off", access_log=False))
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept, then say so."""
        await super().startup(sockets)
        self.ready.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


async def connect(app: FastAPI, key: str, body: bytes) -> AsyncGenerator[Process, None]:
    """Requests over sockets, through the server, from another process; one round after the other."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Server(app)
        task = asyncio.create_task(server.serve([listener]))
        await server.ready.wait()
        arguments = json.dumps([listener.getsockname()[1], key, STREAMS, body.decode()])
        while True:
            try:
                yield await asyncio.create_subprocess_exec(sys.executable, "-c", CLIENT, arguments)
            except GeneratorExit:
                break
        server.should_exit = True
        await task


async def measure(*, stream: bool, sockets: bool) -> tuple[float, float]:
    """Seconds of CPU time of the API's thread: a token, and a request up to its first token."""
    frames = Frames()
    with tempfile.TemporaryDirectory() as home:
        async with serving(Path(home), frames) as (app, key, control):
            tokens = control.inference.tokenizer.encode(TEXT * TOKENS)[:TOKENS]
            message = {"role": "user", "content": TEXT * 4}
            asked = {"model": control.inference.base_id, "messages": [message], "max_tokens": TOKENS}
            body = json.dumps({**asked, "stream": stream}).encode()
            times: list[tuple[float, float]] = []
            connected = connect(app, key, body) if sockets else None
            for _ in range(3):
                frames.requests.clear()
                frames.complete.clear()
                client = Application(app, key, body) if connected is None else await anext(connected)
                begun = time.thread_time()
                async with asyncio.timeout(60):
                    await frames.complete.wait()
                steps = [_frame(frames.requests, token, last=at == TOKENS - 1) for at, token in enumerate(tokens)]
                frames.deliver(steps[0])
                await asyncio.sleep(0.1)
                first = time.thread_time()
                for step in steps[1:]:
                    frames.deliver(step)
                    await asyncio.sleep(PAUSE)
                taken = time.thread_time() - first
                times.append((taken / STREAMS / (TOKENS - 1), (first - begun) / STREAMS))
                if await client.wait():
                    raise RuntimeError("a stream did not come to its end")
            if connected is not None:
                await connected.aclose()
    tokens_taken, requests_taken = zip(*times, strict=True)
    return min(tokens_taken), min(requests_taken)


def _frame(requests: list[str], token: int, *, last: bool) -> bytes:
    reason: FinishReason | None = "length" if last else None
    outputs = [SequenceOutput(request_id=name, token_ids=[token], finish_reason=reason) for name in requests]
    return encode(Outputs([*outputs]))


def streaming() -> Iterator[tuple[str, float]]:
    """Seconds by token and by request, streamed and not, of the application and with the server and sockets."""
    for stream in (True, False):
        for sockets in (False, True):
            token, request = uvloop.run(measure(stream=stream, sockets=sockets))
            name = ("streamed" if stream else "in one answer") + (", with server and socket" if sockets else "")
            yield f"API, a token {name}", token
            yield f"API, a request up to its first token, {name}", request


CASES: dict[str, Callable[[], Iterator[tuple[str, float]]]] = {"streaming": streaming}
