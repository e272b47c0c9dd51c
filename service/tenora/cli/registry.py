"""Commands that act on the database itself, for the operator of this machine."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenora.cli.options import load_settings

T = TypeVar("T")


def on_registry(work: Callable[..., Awaitable[T]]) -> T:
    """Open the registry of this state directory, let `work(registry)` use it, close it."""
    from tenora.control.tenancy.bootstrap import Registry  # noqa: PLC0415 - SQLAlchemy, which the HTTP commands do not need

    async def run() -> T:
        registry = await Registry.open(load_settings())
        try:
            return await work(registry)
        finally:
            await registry.close()

    return asyncio.run(run())
