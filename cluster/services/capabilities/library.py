"""What a service that keeps a library for people to watch can be asked, and what is told of it."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from pydantic import BaseModel, Field

from cluster.errors import NotFound
from cluster.services.http.client import Client
from cluster.times import UtcTime


class LibraryNotFound(NotFound):
    """There is no such library."""

    code = "LIBRARY_NOT_FOUND"


class LibrarySection(BaseModel):
    key: str
    title: str
    type: str = Field(examples=["movie"])
    scanner: str | None
    agent: str | None
    count: int = Field(description="How many movies, series or artists are in it.")


class Libraries(BaseModel):
    libraries: list[LibrarySection]


class AddedItem(BaseModel):
    title: str = Field(description="Of a season or an episode, with the series before it.")
    year: int | None
    type: str = Field(examples=["movie"])
    added_at: UtcTime | None
    library: str | None
    rating: float | None = Field(description="Out of ten.")


class RecentlyAdded(BaseModel):
    items: list[AddedItem] = Field(description="The latest first.")
    total: int = Field(description="How many are shown.")


@dataclass(frozen=True)
class Library:
    libraries: Callable[[Client], Awaitable[Libraries]]
    recently_added: Callable[[Client, int], Awaitable[RecentlyAdded]]  # at most so many
    scan: Callable[[Client, str], Awaitable[str]]  # looks for what is new in it; returns its title


def library_not_found(key: str, titles: dict[str, str]) -> LibraryNotFound:
    """The error that says which libraries there are, by their keys."""
    choices = ", ".join(f"{known_key} ({title})" for known_key, title in titles.items()) or "none"
    return LibraryNotFound(f"There is no library '{key[:100]}'. There are: {choices}.")
