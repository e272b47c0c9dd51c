"""Listings that fetch their pages while they are read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Generic, TypeVar

from tenora_client.models import HasId, ListPage

T = TypeVar("T", bound=HasId)


class AsyncPages(Generic[T]):
    """Iterate to get every item; each iteration asks the server anew, a page at a time."""

    def __init__(self, fetch: Callable[[str | None], Awaitable[ListPage[T]]]) -> None:
        self._fetch = fetch

    async def __aiter__(self) -> AsyncIterator[T]:
        after: str | None = None
        while True:
            page = await self._fetch(after)
            for item in page.data:
                yield item
            if not page.has_more or not page.data:
                return
            after = page.data[-1].id
