"""Stored responses, which clients can read and continue.

A row has only the input items of its own request, and the id of the previous response. A conversation is a chain of
rows.
"""

import re
from collections.abc import Collection, Sequence
from datetime import datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import Index, String, delete, func, literal, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, Document, delete_rows, now
from cluster.db import Sequence as Counter
from cluster.errors import NotFound
from cluster.identity import account_limits
from cluster.ownership import Principal, can_access, require, visible
from cluster.settings import get_settings
from jobs.sweep import register_sweeper
from serve.openai.responses.items import Item

STORED_ITEM_ID = re.compile(r"[a-z]+_([0-9a-f]{32})([0-9a-f]{4})")
SWEEP_PAGE = 1000


class ResponseNotFound(NotFound):
    """There is no such response."""

    code = "RESPONSE_NOT_FOUND"


class PreviousResponseNotFound(NotFound):
    """There is no such response to continue."""

    code = "PREVIOUS_RESPONSE_NOT_FOUND"


class ItemNotFound(NotFound):
    """There is no such item."""

    code = "ITEM_NOT_FOUND"


class StoredResponse(Base):
    __tablename__ = "responses"
    __table_args__ = (Index("ix_responses_owner_id_bytes", "owner_id", "bytes"),)

    id: Mapped[str] = mapped_column(String(60), primary_key=True)
    previous_id: Mapped[str | None] = mapped_column(String(60))  # may be deleted
    given: Mapped[Any] = mapped_column(Document)  # the input items of its own request
    body: Mapped[dict[str, Any]]  # the public form
    bytes: Mapped[int] = mapped_column(Counter)  # of its input items and its public form
    owner_id: Mapped[str | None] = mapped_column(String(36))  # None: without an account
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)


async def store(database: Database, body: dict[str, Any], input_items: Sequence[Item], principal: Principal) -> None:
    async with database.transaction() as session:
        session.add(
            StoredResponse(
                id=body["id"],
                previous_id=body["previous_response_id"],
                given=list(input_items),
                body=body,
                bytes=len(orjson.dumps([input_items, body])),
                owner_id=principal.id,
                created_by=principal.name,
            )
        )


@account_limits.measures(
    "responses_mb", "MB of responses", 'Delete some, or send "store": false.', unit=account_limits.MB
)
async def count_bytes(session: AsyncSession, account_ids: Collection[str]) -> dict[str, int]:
    """The bytes of each account's responses."""
    query = select(StoredResponse.owner_id, func.sum(StoredResponse.bytes))
    query = query.where(StoredResponse.owner_id.in_(account_ids)).group_by(StoredResponse.owner_id)
    return {owner_id: int(total) for owner_id, total in await session.execute(query) if owner_id is not None}


async def find(session: AsyncSession, response_id: str, principal: Principal) -> StoredResponse:
    response = await session.get(StoredResponse, response_id)
    return require(response, principal, ResponseNotFound(f"There is no response '{response_id}'."))


async def conversation_until(session: AsyncSession, response_id: str, principal: Principal) -> list[Item]:
    """The whole conversation, including this response."""
    chain = await _chain(session, response_id, principal)
    if not chain:
        raise PreviousResponseNotFound(f"There is no response '{response_id}' to continue.")
    if missing_id := chain[0].previous_id:
        raise PreviousResponseNotFound(f"'{response_id}' cannot be continued: '{missing_id}' before it was deleted.")
    return [item for response in chain for item in _items(response)]


async def input_items_of(session: AsyncSession, response_id: str, principal: Principal) -> list[Item]:
    """The input of a response: the conversation before it, as far as it still exists, and its own input items."""
    chain = await _chain(session, response_id, principal)
    if not chain:
        raise ResponseNotFound(f"There is no response '{response_id}'.")
    *before, last = chain
    return [item for response in before for item in _items(response)] + last.given


async def find_item(session: AsyncSession, identifier: str, principal: Principal) -> Item:
    if match := STORED_ITEM_ID.fullmatch(identifier):
        stored = await session.get(StoredResponse, f"resp_{match[1]}")
        items = _items(stored) if stored and can_access(stored, principal) else []
        position = int(match[2], 16)
        if position < len(items) and items[position]["id"] == identifier:
            return items[position]
    raise ItemNotFound(f"There is no item '{identifier}'. Only items of stored responses can be referenced.")


async def remove(session: AsyncSession, response_id: str, principal: Principal) -> None:
    await session.delete(await find(session, response_id, principal))


@register_sweeper("responses")
async def remove_old(database: Database) -> int:
    """Delete responses older than serve.response_days, one page in each transaction."""
    removed = 0
    before = now() - timedelta(days=get_settings().serve.response_days)
    while True:
        async with database.transaction() as session:
            page = select(StoredResponse.id).where(StoredResponse.created_at < before).limit(SWEEP_PAGE)
            count = await delete_rows(session, delete(StoredResponse).where(StoredResponse.id.in_(page)))
        if not count:
            return removed
        removed += count


async def _chain(session: AsyncSession, response_id: str, principal: Principal) -> list[StoredResponse]:
    """The response and those before it, as far as they exist, the oldest first."""
    row = StoredResponse
    newest = select(row.id, row.previous_id, literal(0).label("place")).where(row.id == response_id)
    chain = visible(newest, row, principal).cte("chain", recursive=True)
    older = select(row.id, row.previous_id, chain.c.place + 1).join(chain, row.id == chain.c.previous_id)
    chain = chain.union_all(older)
    rows = await session.scalars(select(row).join(chain, row.id == chain.c.id).order_by(chain.c.place.desc()))
    return list(rows)


def _items(response: StoredResponse) -> list[Item]:
    return response.given + response.body["output"]
