"""Commands of the operator: asked of the server that runs, else done on the database of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, TypeVar

import typer

from tenora.cli.connection import running
from tenora.cli.options import load_settings
from tenora_client import Client

if TYPE_CHECKING:
    from tenora.control.tenancy.bootstrap import Registry

T = TypeVar("T")
U = TypeVar("U")
Local = Annotated[
    bool, typer.Option("--local", help="On the database of this machine, without a key, even if a server runs.")
]


def operate(over_http: Callable[[Client], T], on_database: Callable[[Registry], Awaitable[U]], *, local: bool) -> T | U:
    """Do it with the client of the server that runs; without one, or if `local`, with the registry's database."""
    client = None if local else running()
    if client is None:
        return on_registry(on_database)
    with client:
        return over_http(client)


def on_registry(work: Callable[[Registry], Awaitable[T]]) -> T:
    """Open the registry of this state directory, let `work(registry)` use it, close it."""
    from tenora.control.tenancy.bootstrap import Registry  # noqa: PLC0415 - SQLAlchemy, which the HTTP commands do not need

    async def run() -> T:
        registry = await Registry.open(load_settings())
        try:
            return await work(registry)
        finally:
            await registry.close()

    return asyncio.run(run())
