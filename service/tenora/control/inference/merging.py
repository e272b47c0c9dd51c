"""Several streams read as one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import TypeVar

from tenora.aclosing import aclosing

K = TypeVar("K")
T = TypeVar("T")
BUFFERED = 64  # items between the streams and their reader


async def merged(streams: Sequence[tuple[K, AsyncIterator[T]]]) -> AsyncGenerator[tuple[K, T], None]:
    """The items of all streams as they come, each with its stream's key. The first error ends all of them."""
    if len(streams) == 1:
        key, stream = streams[0]
        async with aclosing(stream) as only:
            async for item in only:
                yield key, item
        return
    queue: asyncio.Queue[tuple[K, T] | None] = asyncio.Queue(BUFFERED)

    async def forward(key: K, stream: AsyncIterator[T]) -> None:
        async with aclosing(stream) as items:
            async for item in items:
                await queue.put((key, item))

    async def forward_all() -> None:
        failure: Exception | None = None
        try:
            async with asyncio.TaskGroup() as group:
                for key, stream in streams:
                    group.create_task(forward(key, stream))
        except ExceptionGroup as errors:
            failure = errors.exceptions[0]  # the others are only cancelled because of it
        await queue.put(None)
        if failure is not None:
            raise failure

    worker = asyncio.create_task(forward_all())
    try:
        while (pair := await queue.get()) is not None:
            yield pair
        await worker
    finally:
        worker.cancel()
        await asyncio.gather(worker, return_exceptions=True)
