"""What `tenora serve` does: model → engine → control plane → worker → HTTP, and the same backwards on SIGTERM.

This process holds no tensors; the engine, its child, does.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import typer
import uvicorn
import uvloop
from starlette.types import ASGIApp

from tenora.api.app import create_app
from tenora.api.connections import Connections, connection_limit
from tenora.api.lifecycle import Lifecycle
from tenora.api.protocol import bounded
from tenora.api.starting import Starting
from tenora.cli.compiling import compiling
from tenora.cli.connection import SERVER_FILE
from tenora.cli.fetching import fetch_model
from tenora.cli.kernel_cache import kernels_in_use
from tenora.cli.places import ENGINE_SOCKET
from tenora.cli.progress import StartProgress
from tenora.cli.worker_beside import WorkerBeside
from tenora.config import Settings
from tenora.control.control import Control
from tenora.control.storage.directory import claim
from tenora.control.tenancy.bootstrap import check_configured
from tenora.control.tokenizing.fair_threads import leave_threads
from tenora.engine.client.client import AsyncEngine
from tenora.errors import ConfigurationError
from tenora.model.catalog import ResolvedModel
from tenora.model.spec import ModelSpec, table_rows
from tenora.model.tokenizer import Tokenizer
from tenora.telemetry import logs
from tenora.telemetry.metrics import Metrics

FLUSH_SECONDS = 5  # after the grace, for the last events of streams that were cut off
BACKLOG = 2048
SHOW_SECONDS = 0.2  # between two looks at how far the start is
T = TypeVar("T")

log = logging.getLogger(__name__)


def run(settings: Settings) -> None:
    """Serve until SIGTERM or SIGINT.

    Raises:
        TenoraError: the server could not start; the message says what to do.
    """
    logs.configure(settings.log_level)
    check_configured(settings.api_key)
    # Both before anything that takes time: who comes second is told at once.
    with claimed(settings.root), listening(settings) as listener, kernels_in_use():
        uvloop.run(_run(settings, listener))
    leave_threads()


async def _run(settings: Settings, listener: socket.socket) -> None:
    """Serve; the first signal ends it gracefully, the second at once."""
    stop, started = asyncio.Event(), asyncio.Event()
    at_once = ExitStack()  # what a second signal still does
    service = asyncio.create_task(serve(settings, listener, stop, started, at_once))

    def on_signal(number: int) -> None:
        if stop.is_set():
            at_once.close()
            os._exit(128 + number)  # the other children end when this process is gone
        stop.set()
        if not started.is_set():
            service.cancel()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal, number)
    try:
        await service
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
        log.info("stopped before it was ready")


async def serve(
    settings: Settings, listener: socket.socket, stop: asyncio.Event, started: asyncio.Event, at_once: ExitStack
) -> None:
    """Start everything and set `started`; when `stop` is set, drain and end everything.

    `at_once` takes what ends a child that would outlive this process.
    """
    with StartProgress() as progress:
        front = Starting(progress.state)
        async with answering(front, listener, settings) as serving, compiling(settings):
            model = await shown(fetch_model(settings, progress), progress)
            async with control_plane(settings, model, progress, at_once) as control:
                app = create_app(control, settings)
                front.app = app
                progress.close()
                with announced(settings, control, listener):
                    started.set()
                    stopping = asyncio.create_task(stop.wait())
                    await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
                    stopping.cancel()
                    await drain(app.state.lifecycle, app.state.metrics, control, settings.drain_seconds)


@asynccontextmanager
async def answering(app: ASGIApp, listener: socket.socket, settings: Settings) -> AsyncIterator[asyncio.Task[None]]:
    """HTTP on the socket, from the first moment of the block to its end."""
    server = Server(http_config(app, settings.max_connections))
    serving = asyncio.create_task(server.serve([listener]))
    await server.ready.wait()
    try:
        yield serving
    finally:
        server.should_exit = True
        await serving


async def drain(lifecycle: Lifecycle, metrics: Metrics, control: Control, seconds: float) -> None:
    """Refuse new requests and wait for the open ones; those that outlast the grace end with an error."""
    log.info("draining", extra={"open_requests": lifecycle.open, "seconds": seconds})
    lifecycle.begin_drain()
    control.begin_drain()
    metrics.draining.set(1)
    if await lifecycle.drained(seconds):
        return
    log.warning("the grace is over; open requests are cut off", extra={"open_requests": lifecycle.open})
    try:
        await asyncio.wait_for(lifecycle.idle(), FLUSH_SECONDS)
    except TimeoutError:
        log.warning("some clients do not take their last event", extra={"open_requests": lifecycle.open})


@asynccontextmanager
async def control_plane(
    settings: Settings, model: ResolvedModel, progress: StartProgress, at_once: ExitStack
) -> AsyncIterator[Control]:
    """The engine, the control plane over it and the worker beside it, running."""
    door = None if settings.role == "serve" else settings.root / ENGINE_SOCKET
    engine = AsyncEngine(settings, model.directory, door=door)
    await loaded(engine, progress)
    try:
        tokenizer = await asyncio.to_thread(Tokenizer.load, model.directory)
        spec = await asyncio.to_thread(ModelSpec.from_directory, model.directory)
        worker = WorkerBeside(settings, model)
        at_once.callback(worker.kill)
        try:
            control = await Control.open(
                settings, engine, tokenizer, model, table_rows(spec), claimed=True, queue=worker.line
            )
            try:
                await control.start()
                async with worker.running():
                    yield control
            finally:
                await control.close()
        finally:
            await worker.close()
    finally:
        await engine.close(0)


async def loaded(engine: AsyncEngine, progress: StartProgress) -> None:
    """Start the engine, and show how far that is until it is there."""

    def look() -> None:
        if (step := engine.loading) is not None:
            progress(step.phase, step.done, step.total, step.found)

    progress("engine", 0, 0)
    await shown(engine.start(), progress, look)


async def shown(work: Coroutine[Any, Any, T], progress: StartProgress, look: Callable[[], None] = lambda: None) -> T:
    """What `work` gives. How far it is stays in sight while it says nothing; `look` asks for what it does not say."""
    task = asyncio.create_task(work)
    try:
        while not (await asyncio.wait({task}, timeout=SHOW_SECONDS))[0]:
            look()
            progress.show()
        return task.result()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


class Server(uvicorn.Server):
    """uvicorn, which leaves signals to us (a request that comes during the drain is answered 503, not cut off)."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.ready = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept, then say so."""
        await super().startup(sockets)
        self.ready.set()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Install nothing."""
        yield


def http_config(app: ASGIApp, max_connections: int) -> uvicorn.Config:
    """How uvicorn serves the application."""
    return uvicorn.Config(
        app,
        loop="none",  # it runs in ours, which is uvloop's
        http=bounded(Connections(connection_limit(max_connections))),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=FLUSH_SECONDS,
    )


@contextmanager
def listening(settings: Settings) -> Iterator[socket.socket]:
    """The bound socket, taken before minutes go into loading a model.

    Raises:
        ConfigurationError: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise ConfigurationError(
            f"Cannot listen on {settings.host}, port {settings.port}: {error.strerror or error}. "
            "Stop what uses it, or choose another with --port (0 picks a free one)."
        ) from error
    with listener:
        listener.setblocking(False)
        yield listener


@contextmanager
def claimed(root: Path) -> Iterator[None]:
    """The state directory, held by this process."""
    lock = claim(root)
    try:
        yield
    finally:
        os.close(lock)


@contextmanager
def announced(settings: Settings, control: Control, listener: socket.socket) -> Iterator[None]:
    """Say where the server is: on stdout, and in the state directory for the command line."""
    url = url_of(listener)
    path = settings.root / SERVER_FILE
    note = json.dumps({"url": url, "pid": os.getpid(), "model": control.inference.base_id})
    path.unlink(missing_ok=True)  # of a process that was killed, and with whatever permissions it had
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(f"{note}\n")
    made = control.bootstrap
    if made.secret is not None:
        typer.echo(f"API key of the default tenant, shown once and kept in {made.credentials}: {made.secret}")
    typer.echo(f"Tenora is ready at {url} with {control.inference.base_id}")
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def url_of(listener: socket.socket) -> str:
    """An address at which this machine reaches the socket."""
    host, port = listener.getsockname()[:2]
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - compared with, not bound to
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"
