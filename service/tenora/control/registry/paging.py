"""Keyset pages over the `seq` columns, as OpenAI's `after` and `limit` mean them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from sqlalchemy import Select
from sqlalchemy.ext.asyncio import AsyncSession

from tenora.errors import InvalidRequestError

T = TypeVar("T")
Order = Literal["asc", "desc"]
LARGEST_PAGE = 10_000


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """One page of a listing."""

    items: Sequence[T]
    has_more: bool


async def page(
    session: AsyncSession,
    query: Select[Any],
    table: Any,
    record: Callable[[Any], T],
    *,
    after: str | None,
    limit: int,
    order: Order = "desc",
) -> Page[T]:
    """The records of `query` that follow the one with id `after`.

    `query` is already narrowed to a tenant, and so is the look-up of `after`: another tenant's id is an unknown one.
    """
    if not 1 <= limit <= LARGEST_PAGE:
        raise InvalidRequestError(f"limit must lie between 1 and {LARGEST_PAGE}.", param="limit")
    if order not in {"asc", "desc"}:
        raise InvalidRequestError("order must be asc or desc.", param="order")
    if after is not None:
        cursor = await session.scalar(query.with_only_columns(table.seq).where(table.id == after))
        if cursor is None:
            raise InvalidRequestError("after must be the id of an item of this listing.", param="after")
        query = query.where(table.seq > cursor if order == "asc" else table.seq < cursor)
    query = query.order_by(table.seq.asc() if order == "asc" else table.seq.desc()).limit(limit + 1)
    rows = list(await session.scalars(query))
    return Page(items=[record(row) for row in rows[:limit]], has_more=len(rows) > limit)
