"""In whose name something is done, and the one rule for rows that belong to somebody.

People see, change and delete what is theirs; administrators and the platform itself everything. For anybody else a row
does not exist: the answer is 404, never 403.
"""

from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from sqlalchemy import Select, false
from sqlalchemy.orm import Mapped

from cluster.errors import NotFound


@dataclass(frozen=True, kw_only=True)
class Principal:
    """In whose name something is done: a person, or a part of the platform."""

    id: str | None = None  # None: the platform itself, or the user of this machine
    name: str
    is_admin: bool = False


def system(name: str) -> Principal:
    """A part of the platform, which may do everything."""
    return Principal(name=name, is_admin=True)


LOCAL = system("local")
"""The user of this machine, who needs no credential."""


class Owned(Protocol):
    """A table whose rows belong to somebody. None: to nobody but the platform."""

    owner_id: Mapped[str | None]


Row = TypeVar("Row", bound=Owned)
Query = TypeVar("Query", bound=Select[*tuple[Any, ...]])


def visible(query: Query, table: type[Owned], principal: Principal) -> Query:
    """Of the rows of this query those that the principal may see."""
    if principal.is_admin:
        return query
    return query.where(table.owner_id == principal.id if principal.id is not None else false())


def can_access(row: Owned, principal: Principal) -> bool:
    return principal.is_admin or (principal.id is not None and row.owner_id == principal.id)


def require(row: Row | None, principal: Principal, missing: NotFound) -> Row:
    """This row, if there is one that the principal may see; raises `missing` otherwise."""
    if row is None or not can_access(row, principal):
        raise missing
    return row
