"""The compiler of the CPU's kernels as a child of `tenora serve`, beside everything else that a start does."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from tenora.config import Settings
from tenora.environment import for_child
from tenora.model.catalog import find_model
from tenora_kernels.cpu.runtime import cache


@asynccontextmanager
async def compiling(settings: Settings) -> AsyncIterator[None]:
    """Compile while the block runs; the engine waits for what it needs. Nothing is started if nothing is missing.

    Raises:
        UnsupportedModelError: the base that the settings name is here, and of an unsupported kind.
    """
    model = await asyncio.to_thread(find_model, settings.model, settings.root)
    directory = None if model is None else str(model.directory)
    name = json.dumps([settings.device, settings.dtype, settings.role != "serve", directory])
    lock = None if settings.device == "cuda" or cache.complete(name) else cache.under_way()
    if lock is None:  # nothing to do, nowhere to keep it, or another server compiles already
        yield
        return
    launch = {
        "settings": settings.model_dump(mode="json", exclude={"api_key", "database_url"}),
        "model_dir": directory,
        "name": name,
    }
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "tenora.engine.compiling", str(lock)),
            stdin=asyncio.subprocess.PIPE,
            env=for_child(),
            pass_fds=(lock,),
            start_new_session=True,
        )
    finally:
        os.close(lock)
    try:
        await send(process, json.dumps(launch).encode())
        yield
    finally:
        if process.returncode is None:
            process.kill()  # its own children end with it
            await process.wait()


async def send(process: asyncio.subprocess.Process, message: bytes) -> None:
    """Write a child's standard input to its end. One that is dead already shows in what it has not compiled."""
    if process.stdin is None:
        return
    with suppress(BrokenPipeError, ConnectionResetError):
        process.stdin.write(message)
        await process.stdin.drain()
        process.stdin.close()
        await process.stdin.wait_closed()
