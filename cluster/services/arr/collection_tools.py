"""What a person or a model may have any service with a collection do. What is one's own is in its own module."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from cluster.db import now
from cluster.services.capabilities import collection as capabilities_collection
from cluster.services.capabilities.collection import API, ID_MAX, Collection, Number, Thing, Title, Wanted
from cluster.services.connector import Tool
from cluster.services.http.client import Client
from cluster.services.tools import Arguments

MAX_LISTED = 200

Id = Annotated[int, Field(ge=1, le=ID_MAX)]
Run = Callable[[Client, Any], Awaitable[Any]]


class Limit(Arguments):
    limit: int = Field(default=50, ge=1, le=MAX_LISTED, description="How many at most.")


class Listing(Limit):
    query: str | None = Field(default=None, max_length=200, description="Only those with this in their title.")
    offset: int = Field(default=0, ge=0, le=ID_MAX, description="How many to leave out at the beginning.")


class Term(Arguments):
    title: str = Field(min_length=1, max_length=200, description="The title, or a part of it.")


class Days(Arguments):
    days: int = Field(default=7, ge=1, le=90, description="How far to look ahead.")


class Adding(Arguments, ABC):
    """What every service wants to know of something new."""

    title: str | None = Field(default=None, min_length=1, max_length=200, description="Looked up, without an id.")
    year: int | None = Field(default=None, ge=1800, le=2200, description="Tells apart what has the same title.")
    quality_profile_id: Id | None = Field(default=None, description="Without it, the service's first.")
    root_folder_path: str | None = Field(
        default=None, min_length=1, max_length=1000, description="Without it, the service's first."
    )
    monitored: bool = Field(default=True, description="Whether to get it when there is a release.")

    @property
    @abstractmethod
    def outer_id(self) -> int | None:
        """The id that it has in the world."""

    @property
    @abstractmethod
    def fields(self) -> dict[str, object]:
        """What only this service is told."""

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.title, self.outer_id, self.year, self.quality_profile_id, self.root_folder_path, self.fields)

    @model_validator(mode="after")
    def check_named(self) -> "Adding":
        if self.title is None and self.outer_id is None:
            raise ValueError("a title or an id is needed")
        return self


class Entry(BaseModel):
    """Something in the queue."""

    id: Number
    title: Title | None = None
    status: Title | None = None
    trackedDownloadStatus: Title | None = None
    trackedDownloadState: Title | None = None
    size: float | None = None
    sizeleft: float | None = None
    timeleft: Title | None = None
    errorMessage: str | None = None
    downloadClient: Title | None = None
    downloadId: Title | None = None


class Queue(BaseModel):
    totalRecords: Number
    records: list[Entry]


def listing(collection: Collection[Any], word: str) -> Run:
    async def run(client: Client, wanted: Listing) -> dict[str, Any]:
        rows: list[Thing] = []
        total = await capabilities_collection.each(client, collection, rows.append, **wanted.model_dump())
        return {word: [told(row) for row in rows], "total": total}

    return run


def looking_up(collection: Collection[Any]) -> Run:
    async def run(client: Client, wanted: Term) -> list[dict[str, Any]]:
        found = (await capabilities_collection.look_up(client, collection, wanted.title))[
            : capabilities_collection.MAX_CHOICES
        ]
        return [capabilities_collection.choice(collection, one) for one in found]

    return run


def adding(collection: Collection[Any]) -> Run:
    async def run(client: Client, wanted: Adding) -> dict[str, Any]:
        return told(await capabilities_collection.add(client, collection, wanted.wanted))

    return run


def told(thing: Thing) -> dict[str, Any]:
    return thing.model_dump(mode="json", exclude_none=True)


async def queue(client: Client, wanted: Limit) -> dict[str, Any]:
    answer = await client.get(f"{API}/queue", page=1, pageSize=wanted.limit)
    page = client.read(Queue, answer)
    entries = [entry.model_dump(exclude_none=True) for entry in page.records[: wanted.limit]]
    return {"queue": entries, "total": page.totalRecords}


async def profiles(client: Client, _: Arguments) -> list[dict[str, Any]]:
    return [profile.model_dump() for profile in await capabilities_collection.quality_profiles(client)]


async def folders(client: Client, _: Arguments) -> list[dict[str, Any]]:
    return [folder.model_dump() for folder in await capabilities_collection.root_folders(client)]


async def calendar(client: Client, wanted: Days, **more: bool) -> Any:
    begin = now()
    end = begin + timedelta(days=wanted.days)
    return await client.get(f"{API}/calendar", start=begin.isoformat(), end=end.isoformat(), **more)


async def command(client: Client, body: dict[str, object]) -> dict[str, Any]:
    return {"command_id": capabilities_collection.command_name(await capabilities_collection.command(client, body))}


SHARED = (
    Tool("get_queue", "What is being downloaded, and how far it is.", Limit, queue),
    Tool("get_quality_profiles", "Which quality profiles there are.", Arguments, profiles),
    Tool("get_root_folders", "Which folders there are to add to.", Arguments, folders),
)
"""Tools that are the same for all."""
