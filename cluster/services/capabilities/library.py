"""The capability to list and scan media libraries, and the public schemas of libraries."""

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
    count: int = Field(description="Number of movies, series or artists in it.")


class Libraries(BaseModel):
    libraries: list[LibrarySection]


class AddedItem(BaseModel):
    title: str = Field(description="For a season or an episode, it begins with the title of the series.")
    year: int | None
    type: str = Field(examples=["movie"])
    added_at: UtcTime | None
    library: str | None
    rating: float | None = Field(description="From 0 to 10.")


class RecentlyAdded(BaseModel):
    items: list[AddedItem] = Field(description="Newest first.")
    total: int = Field(description="Number of items in this list.")


@dataclass(frozen=True)
class Library:
    libraries: Callable[[Client], Awaitable[Libraries]]
    recently_added: Callable[[Client, int], Awaitable[RecentlyAdded]]  # with a limit
    scan: Callable[[Client, str], Awaitable[str]]  # scans a library for new files; returns its title


def library_not_found(key: str, titles: dict[str, str]) -> LibraryNotFound:
    """Build the error for an unknown key. It lists the libraries there are."""
    choices = ", ".join(f"{known_key} ({title})" for known_key, title in titles.items()) or "none"
    return LibraryNotFound(f"There is no library '{key[:100]}'. There are: {choices}.")
