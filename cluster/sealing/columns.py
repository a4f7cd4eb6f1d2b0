"""The columns with sealed secrets, of all tables. Each is named by the module that declares its table."""

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from cluster import secrets
from cluster.secrets import SealBroken


@dataclass(frozen=True)
class SealedSecret:
    """What a sealed value is to people."""

    name: str
    """the key of the service 'TV'"""
    entered_by: str
    """The request, or the command, by which it is entered again."""


Describe = Callable[[Any], SealedSecret]
"""Tells of a row of the table what its secret is."""

_columns: dict[InstrumentedAttribute[str | None], Describe] = {}


def contains_secrets(column: InstrumentedAttribute[str | None], describe: Describe) -> None:
    """Name a column whose values are sealed. None in it: there is no secret."""
    _columns[column] = describe


async def find_unreadable(session: AsyncSession) -> list[SealedSecret]:
    """Return the secrets that this installation cannot open."""
    unreadable: list[SealedSecret] = []
    for column, describe in _columns.items():
        async for row, secret in _read(session, column):
            if secret is None:
                unreadable.append(describe(row))
    return unreadable


async def seal_again(session: AsyncSession) -> int:
    """Seal all secrets with the present key, and return their number. What cannot be opened stays as it is."""
    count = 0
    for column in _columns:
        table: Table = column.class_.__table__
        (primary_key,) = table.primary_key
        # It is the same secret: no other column tells of a change.
        unchanged = {other.key: other for other in table.columns if other.onupdate is not None}
        async for row, secret in _read(session, column, lock=True):
            if secret is not None:
                statement = update(table).where(primary_key == getattr(row, primary_key.key))
                await session.execute(statement.values({column.key: secrets.seal(secret), **unchanged}))
                count += 1
    return count


async def _read(
    session: AsyncSession, column: InstrumentedAttribute[str | None], *, lock: bool = False
) -> AsyncIterator[tuple[Any, str | None]]:
    """Yield each row with a secret, and the secret. None: it cannot be opened."""
    table: Table = column.class_.__table__
    query = select(column.class_).where(column.is_not(None)).order_by(*table.primary_key)
    for row in (await session.scalars(query.with_for_update() if lock else query)).all():
        try:
            yield row, secrets.unseal(getattr(row, column.key))
        except SealBroken:
            yield row, None
