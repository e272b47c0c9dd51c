# Made of async_paging.py by scripts/unasync.py (`make client`): change that one.
"""Listings that fetch their pages while they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from tenora_client.models import HasId, ListPage

T = TypeVar("T", bound=HasId)


class Pages(Generic[T]):
    """Iterate to get every item; each iteration asks the server anew, a page at a time."""

    def __init__(self, fetch: Callable[[str | None], ListPage[T]]) -> None:
        self._fetch = fetch

    def __iter__(self) -> Iterator[T]:
        after: str | None = None
        while True:
            page = self._fetch(after)
            yield from page.data
            if not page.has_more or not page.data:
                return
            after = page.data[-1].id
