"""Pagination: parameters and envelopes of lists, for Forgearr's API and for OpenAI's."""

from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Depends, Query, Request
from pydantic import BaseModel, Field

Item = TypeVar("Item")


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


def cursor_page(items: list[Item], ids: list[str], limit: int) -> CursorPage[Item]:
    """The page of at most `limit` items. If there is one item more, there are more pages."""
    page_ids = ids[:limit]
    first, last = (page_ids[0], page_ids[-1]) if page_ids else (None, None)
    return CursorPage(data=items[:limit], first_id=first, last_id=last, has_more=len(items) > limit)


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
