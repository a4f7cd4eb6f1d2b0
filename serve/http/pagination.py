"""Pagination: how lists are read in parts, and the parameters and envelopes of lists in Forgearr's API and in OpenAI's.

A list that is read by offset also has a total, which needs a count of all rows for each page. A list that is read by
key has none, and is not affected by rows that are added meanwhile. New lists are read by key.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any, Generic, Literal, TypeVar

from fastapi import Depends, Query, Request
from pydantic import BaseModel, Field
from sqlalchemy import ColumnElement, Select, and_, false, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from cluster.errors import ForgearrError

Item = TypeVar("Item")


@dataclass(frozen=True)
class OffsetSlice(Generic[Item]):
    items: list[Item]
    total: int


@dataclass(frozen=True)
class KeysetSlice(Generic[Item]):
    items: list[Item]
    has_more: bool


async def offset_slice(session: AsyncSession, ordered: Select[Item], skip: int, limit: int) -> OffsetSlice[Item]:
    total = await session.scalar(select(func.count()).select_from(ordered.order_by(None).subquery()))
    rows = await session.scalars(ordered.offset(skip).limit(limit))
    return OffsetSlice(list(rows), total or 0)


async def keyset_slice(
    session: AsyncSession,
    query: Select[Item],
    key: Sequence[InstrumentedAttribute[Any]],
    after: Sequence[Any] | None,
    limit: int,
    *,
    ascending: bool = False,
) -> KeysetSlice[Item]:
    """The rows after the one with the key `after`. The columns of the key must identify a row."""
    if after is not None:
        query = query.where(_is_beyond(key, after, ascending))
    ordered = query.order_by(*(column.asc() if ascending else column.desc() for column in key))
    rows = list(await session.scalars(ordered.limit(limit + 1)))
    return KeysetSlice(rows[:limit], len(rows) > limit)


def slice_after(
    items: list[Item],
    after: str | None,
    limit: int,
    missing: ForgearrError,
    id_of: Callable[[Item], str] = attrgetter("id"),
) -> KeysetSlice[Item]:
    """The same for a list in memory. Raises `missing` if the list has no item `after`."""
    start = 0
    if after is not None:
        ids = [id_of(item) for item in items]
        if after not in ids:
            raise missing
        start = ids.index(after) + 1
    return KeysetSlice(items[start : start + limit], len(items) > start + limit)


class Links(BaseModel):
    next: str | None = Field(description="Path of the next page. Null on the last page.")
    prev: str | None


class Page(BaseModel, Generic[Item]):
    items: list[Item]
    total: int = Field(description="Number of items on all pages.")
    skip: int
    limit: int
    links: Links


class CursorPage(BaseModel, Generic[Item]):
    """A page in OpenAI's format. Send `last_id` as `after` for the next page."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | None
    last_id: str | None
    has_more: bool


def cursor_page(items: list[Item], has_more: bool, id_of: Callable[[Item], str] = attrgetter("id")) -> CursorPage[Item]:
    first, last = (id_of(items[0]), id_of(items[-1])) if items else (None, None)
    return CursorPage(data=items, first_id=first, last_id=last, has_more=has_more)


class Pagination:
    """The query parameters `skip` and `limit`."""

    def __init__(
        self,
        request: Request,
        skip: Annotated[int, Query(ge=0, le=2**31 - 1)] = 0,
        limit: Annotated[int, Query(ge=1, le=100)] = 100,
    ) -> None:
        self.skip = skip
        self.limit = limit
        self._url = request.url

    async def read(self, session: AsyncSession, ordered: Select[Item]) -> OffsetSlice[Item]:
        return await offset_slice(session, ordered, self.skip, self.limit)

    def cut(self, items: list[Item]) -> OffsetSlice[Item]:
        """The same for a list in memory."""
        return OffsetSlice(items[self.skip : self.skip + self.limit], len(items))

    def page(self, items: list[Item], total: int) -> Page[Item]:
        more = self.skip + self.limit < total
        links = Links(
            next=self._link(self.skip + self.limit) if more else None,
            prev=self._link(max(0, self.skip - self.limit)) if self.skip else None,
        )
        return Page(items=items, total=total, skip=self.skip, limit=self.limit, links=links)

    def _link(self, skip: int) -> str:
        url = self._url.include_query_params(skip=skip, limit=self.limit)
        return f"{url.path}?{url.query}"


PaginationParams = Annotated[Pagination, Depends()]


def _is_beyond(key: Sequence[InstrumentedAttribute[Any]], after: Sequence[Any], ascending: bool) -> ColumnElement[bool]:
    """Whether a row comes after the one with this key, compared column by column."""
    condition: ColumnElement[bool] = false()
    for column, value in reversed([*zip(key, after, strict=True)]):
        beyond = column > value if ascending else column < value
        condition = or_(beyond, and_(column == value, condition))
    return condition
