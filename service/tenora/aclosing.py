"""Ending an asynchronous iterator on every way out of a block."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class aclosing(Generic[T]):  # noqa: N801 - called like a function, as its like in contextlib
    """`contextlib.aclosing` for a value that is declared as an iterator and is a generator.

    Closing a generation ends it in the engine.
    """

    def __init__(self, stream: AsyncIterator[T]) -> None:
        self._stream = stream

    async def __aenter__(self) -> AsyncIterator[T]:
        return self._stream

    async def __aexit__(self, *_: object) -> None:
        if isinstance(self._stream, AsyncGenerator):
            await self._stream.aclose()
