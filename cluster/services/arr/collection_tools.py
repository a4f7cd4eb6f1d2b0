"""Tools that Sonarr and Radarr share: list, look up and add items, and read the queue, profiles and folders."""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Annotated, Any

from pydantic import BaseModel, Field, model_validator

from cluster.db import now
from cluster.services.capabilities import collection as capabilities_collection
from cluster.services.capabilities.collection import API, MAX_ID, Collection, CollectionItem, ItemToAdd, Number, Title
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool

MAX_LIMIT = 200

Id = Annotated[int, Field(ge=1, le=MAX_ID)]
ToolFunction = Callable[[Client, Any], Awaitable[Any]]


class LimitArguments(Arguments):
    limit: int = Field(default=50, ge=1, le=MAX_LIMIT, description="Maximum number of items.")


class ListArguments(LimitArguments):
    query: str | None = Field(default=None, max_length=200, description="Only items with this in their title.")
    offset: int = Field(default=0, ge=0, le=MAX_ID, description="Number of items to skip.")


class LookupArguments(Arguments):
    title: str = Field(min_length=1, max_length=200, description="The title, or a part of it.")


class CalendarArguments(Arguments):
    days: int = Field(default=7, ge=1, le=90, description="Number of days from now.")


class AddRequest(Arguments, ABC):
    """The arguments for adding an item that are the same for all services."""

    title: str | None = Field(default=None, min_length=1, max_length=200, description="Looked up if there is no id.")
    year: int | None = Field(default=None, ge=1800, le=2200, description="Distinguishes items of the same title.")
    quality_profile_id: Id | None = Field(default=None, description="Default: the first one of the service.")
    root_folder_path: str | None = Field(
        default=None, min_length=1, max_length=1000, description="Default: the first one of the service."
    )
    monitored: bool = Field(default=True, description="Whether to download it when there is a release.")

    @property
    @abstractmethod
    def external_id(self) -> int | None:
        """The id of the item in a public database, such as TheTVDB."""

    @property
    @abstractmethod
    def extra_fields(self) -> dict[str, object]:
        """The fields that only this service has."""

    @property
    def item_to_add(self) -> ItemToAdd:
        return ItemToAdd(
            self.title, self.external_id, self.year, self.quality_profile_id, self.root_folder_path, self.extra_fields
        )

    @model_validator(mode="after")
    def validate_title_or_id(self) -> "AddRequest":
        if self.title is None and self.external_id is None:
            raise ValueError("a title or an id is needed")
        return self


class QueueItem(BaseModel):
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
    records: list[QueueItem]


def make_list(collection: Collection[Any], result_key: str) -> ToolFunction:
    async def run(client: Client, arguments: ListArguments) -> dict[str, Any]:
        rows: list[CollectionItem] = []
        total = await capabilities_collection.for_each_item(client, collection, rows.append, **arguments.model_dump())
        return {result_key: [to_json(row) for row in rows], "total": total}

    return run


def make_lookup(collection: Collection[Any]) -> ToolFunction:
    async def run(client: Client, arguments: LookupArguments) -> list[dict[str, Any]]:
        results = (await capabilities_collection.look_up(client, collection, arguments.title))[
            : capabilities_collection.MAX_CHOICES
        ]
        return [capabilities_collection.to_choice(collection, result) for result in results]

    return run


def make_add(collection: Collection[Any]) -> ToolFunction:
    async def run(client: Client, add_request: AddRequest) -> dict[str, Any]:
        return to_json(await capabilities_collection.add(client, collection, add_request.item_to_add))

    return run


def to_json(item: CollectionItem) -> dict[str, Any]:
    return item.model_dump(mode="json", exclude_none=True)


async def get_queue(client: Client, arguments: LimitArguments) -> dict[str, Any]:
    response = await client.get(f"{API}/queue", page=1, pageSize=arguments.limit)
    page = client.parse(Queue, response)
    items = [item.model_dump(exclude_none=True) for item in page.records[: arguments.limit]]
    return {"queue": items, "total": page.totalRecords}


async def get_quality_profiles(client: Client, _: Arguments) -> list[dict[str, Any]]:
    return [profile.model_dump() for profile in await capabilities_collection.quality_profiles(client)]


async def get_root_folders(client: Client, _: Arguments) -> list[dict[str, Any]]:
    return [folder.model_dump() for folder in await capabilities_collection.root_folders(client)]


async def get_calendar_items(client: Client, arguments: CalendarArguments, **flags: bool) -> Any:
    start = now()
    end = start + timedelta(days=arguments.days)
    return await client.get(f"{API}/calendar", start=start.isoformat(), end=end.isoformat(), **flags)


async def run_command(client: Client, body: dict[str, object]) -> dict[str, Any]:
    return {
        "command_id": capabilities_collection.format_command_id(await capabilities_collection.run_command(client, body))
    }


SHARED_TOOLS = (
    Tool("get_queue", "List active downloads, with their progress.", LimitArguments, get_queue),
    Tool("get_quality_profiles", "List the quality profiles.", Arguments, get_quality_profiles),
    Tool("get_root_folders", "List the root folders, to which items can be added.", Arguments, get_root_folders),
)
