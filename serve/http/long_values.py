"""Leaves long values out of lists: the database measures them, so that they are not even loaded."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field
from sqlalchemy import Text, case, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute, defer
from sqlalchemy.orm.interfaces import ORMOption

MAX_CHARACTERS = 4096


@dataclass(frozen=True)
class ShortValues:
    """Some fields of an item of a list."""

    values: dict[str, Any]
    truncated: list[str]
    """The fields whose value is longer. It is None here."""


def truncated_field() -> Any:
    """The field `truncated` of a view."""
    return Field(
        default_factory=list,
        description=f"In a list: the fields that are left out because they have more than {MAX_CHARACTERS} characters. "
        "The item itself has them.",
    )


def without(*columns: InstrumentedAttribute[Any]) -> Iterable[ORMOption]:
    """Options of a query that does not load these columns."""
    return [defer(column, raiseload=True) for column in columns]


async def read_short_values(
    session: AsyncSession,
    key: InstrumentedAttribute[str],
    columns: Sequence[InstrumentedAttribute[Any]],
    ids: Sequence[str],
) -> dict[str, ShortValues]:
    """These columns of the rows with these ids, without the long values."""
    selected: list[Any] = [key]
    for column in columns:
        is_long = func.coalesce(func.length(cast(column, Text)), 0) > MAX_CHARACTERS
        selected += [is_long, case((~is_long, column))]
    rows = await session.execute(select(*selected).where(key.in_(ids)))
    names = [column.key for column in columns]
    return {
        row[0]: ShortValues(
            dict(zip(names, row[2::2], strict=True)),
            [name for name, is_long in zip(names, row[1::2], strict=True) if is_long],
        )
        for row in rows.all()
    }
