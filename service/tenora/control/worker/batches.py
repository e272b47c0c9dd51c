"""Events of a run taken together, so that they are written together: a transaction a second, not one a step."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from typing import TypeVar

T = TypeVar("T")


async def batches(items: AsyncIterator[T], joins: Callable[[T], bool], seconds: float) -> AsyncGenerator[list[T], None]:
    """What comes one after the other, in lists that are not empty.

    A list ends `seconds` after its first item has come, and before and after an item that does not join others. When
    `items` ends or raises, what has come before is told first.
    """
    waiting: list[T] = []
    due = 0.0
    upcoming = asyncio.ensure_future(_next(items))
    try:
        while True:
            await asyncio.wait([upcoming], timeout=max(0.0, due - time.monotonic()) if waiting else None)
            if upcoming.done() and upcoming.exception() is None and (found := upcoming.result()) and joins(found[0]):
                due = due if waiting else time.monotonic() + seconds
                waiting.append(found[0])
                upcoming = asyncio.ensure_future(_next(items))
                continue
            if waiting:
                batch, waiting = waiting, []
                yield batch
            if not upcoming.done():
                continue
            if not (found := upcoming.result()):
                return
            upcoming = asyncio.ensure_future(_next(items))
            yield found
    finally:
        upcoming.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await upcoming


async def _next(items: AsyncIterator[T]) -> list[T]:
    """The next item alone in a list, which is empty at the end: a task cannot raise StopAsyncIteration."""
    async for item in items:
        return [item]
    return []
