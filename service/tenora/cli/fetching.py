"""The base model for `tenora serve`: found here, or fetched by a child that ends when the service does."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable
from typing import Any

from tenora.config import Settings
from tenora.environment import for_child
from tenora.errors import UnsupportedModelError
from tenora.model.catalog import ResolvedModel, find_model

END_SECONDS = 10.0  # for removing what is half written


async def fetch_model(settings: Settings, report: Callable[[str, int, int], None]) -> ResolvedModel:
    """The model that `settings` name. Cancelled, it leaves no process and no half-written file behind.

    Raises:
        UnsupportedModelError: there is none of that name, it cannot be fetched, or it is of an unsupported kind.
    """
    found = await asyncio.to_thread(find_model, settings.model, settings.root)
    if found is not None:
        return found
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-m", "tenora.model.fetch", settings.model, str(settings.root)),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        env=for_child(),
        start_new_session=True,  # the terminal's Ctrl-C is for this process, which then ends the child
    )
    try:
        last = await _follow(process, report)
        await process.wait()
    finally:
        await _end(process)
    if "directory" in last:
        return ResolvedModel(settings.root / last["directory"], last["id"])
    raise UnsupportedModelError(last.get("error", "The base model could not be fetched; the reason is above."))


async def _follow(process: asyncio.subprocess.Process, report: Callable[[str, int, int], None]) -> dict[str, Any]:
    """Report each step that the child tells; gives the last thing that it said."""
    last: dict[str, Any] = {}
    while process.stdout is not None and (line := await process.stdout.readline()):
        last = json.loads(line)
        if "stage" in last:
            report(last["stage"], last["done"], last["total"])
    return last


async def _end(process: asyncio.subprocess.Process) -> None:
    if process.returncode is not None:
        return
    process.terminate()
    try:
        await asyncio.wait_for(process.wait(), END_SECONDS)
    except TimeoutError:
        process.kill()
        await process.wait()
