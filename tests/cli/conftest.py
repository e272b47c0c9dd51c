"""The commands against a real HTTP server, over a real control plane with a scripted engine."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from typer.testing import CliRunner

from tenora.cli.app import app
from tenora.cli.serving import Server, http_config, listening, url_of

# The same service as the API's tests use.
from tests.api.conftest import Service, make_adapter, script, service, settings  # noqa: F401


@pytest.fixture(autouse=True)
def _logging_put_back() -> Iterator[None]:
    """A command logs to its own stderr, which is closed when it has ended; nothing may be logged there later."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@dataclass
class Shell:
    """Runs commands in a thread, so that the server of this loop can answer them."""

    service: Service

    async def __call__(self, *arguments: str, stdin: str | None = None) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, list(arguments), input=stdin)

    async def ok(self, *arguments: str, stdin: str | None = None) -> str:
        result = await self(*arguments, stdin=stdin)
        assert result.exit_code == 0, result.output
        return str(result.stdout)


@pytest.fixture
async def shell(
    service: Service,  # noqa: F811 - the fixture of that name
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Shell]:
    """A served service, and a command line that finds it through its environment."""
    with listening(service.settings.model_copy(update={"port": 0})) as listener:
        server = Server(http_config(service.app, service.settings.max_connections))
        serving = asyncio.create_task(server.serve([listener]))
        await server.ready.wait()
        monkeypatch.setenv("TENORA_URL", url_of(listener))
        monkeypatch.setenv("TENORA_HOME", str(service.settings.root))
        yield Shell(service)
        server.should_exit = True
        await serving


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """Commands on a fresh state directory, without a server."""
    monkeypatch.setenv("TENORA_HOME", str(tmp_path_factory.mktemp("home")))
    return lambda *arguments, **options: CliRunner().invoke(app, list(arguments), **options)
