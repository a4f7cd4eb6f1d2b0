"""List and scan the libraries of Plex. Plex omits empty fields from its responses, also empty lists."""

from datetime import UTC, datetime
from typing import Annotated
from urllib.parse import quote

from pydantic import BaseModel, Field

from cluster.services.capabilities import library as capabilities_library
from cluster.services.capabilities.library import AddedItem, Libraries, Library, LibrarySection, RecentlyAdded
from cluster.services.http.client import Client

MAX_TIMESTAMP = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


class Section(BaseModel):
    key: str
    title: str
    type: str
    scanner: str | None = None
    agent: str | None = None


class Item(BaseModel):
    type: str
    title: str
    grandparentTitle: str | None = None
    parentTitle: str | None = None
    index: int | None = None
    parentIndex: int | None = None
    year: int | None = None
    addedAt: Annotated[float, Field(ge=0, le=MAX_TIMESTAMP)] | None = None
    librarySectionTitle: str | None = None
    rating: Annotated[float, Field(allow_inf_nan=False)] | None = None
    audienceRating: Annotated[float, Field(allow_inf_nan=False)] | None = None


class Sections(BaseModel):
    Directory: list[Section] = []


class Items(BaseModel):
    Metadata: list[Item] = []


class Count(BaseModel):
    totalSize: int | None = None
    size: int


class SectionsResponse(BaseModel):
    MediaContainer: Sections


class ItemsResponse(BaseModel):
    MediaContainer: Items


class CountResponse(BaseModel):
    MediaContainer: Count


async def list_libraries(client: Client) -> Libraries:
    sections = await _sections(client)
    return Libraries(
        libraries=[
            LibrarySection(**section.model_dump(), count=await _count(client, section.key)) for section in sections
        ]
    )


async def recently_added(client: Client, limit: int) -> RecentlyAdded:
    page = {"X-Plex-Container-Start": 0, "X-Plex-Container-Size": limit}
    response = await client.get("/library/recentlyAdded", **page)
    items = [_to_added_item(item) for item in client.parse(ItemsResponse, response).MediaContainer.Metadata[:limit]]
    return RecentlyAdded(items=items, total=len(items))


async def scan(client: Client, key: str) -> str:
    titles = {section.key: section.title for section in await _sections(client)}
    if key not in titles:
        raise capabilities_library.library_not_found(key, titles)
    await client.get_text(f"/library/sections/{quote(key, safe='')}/refresh")  # the response is empty
    return titles[key]


LIBRARY = Library(libraries=list_libraries, recently_added=recently_added, scan=scan)


async def _sections(client: Client) -> list[Section]:
    return client.parse(SectionsResponse, await client.get("/library/sections")).MediaContainer.Directory


async def _count(client: Client, key: str) -> int:
    """Return the number of items. An empty page contains it."""
    page = {"X-Plex-Container-Start": 0, "X-Plex-Container-Size": 0}
    response = await client.get(f"/library/sections/{quote(key, safe='')}/all", **page)
    container = client.parse(CountResponse, response).MediaContainer
    return container.size if container.totalSize is None else container.totalSize


def _to_added_item(item: Item) -> AddedItem:
    return AddedItem(
        title=_title(item),
        year=item.year,
        type=item.type,
        added_at=None if item.addedAt is None else datetime.fromtimestamp(item.addedAt, UTC),
        library=item.librarySectionTitle,
        rating=item.audienceRating if item.rating is None else item.rating,
    )


def _title(item: Item) -> str:
    if item.type == "season" and item.parentTitle:
        return f"{item.parentTitle} - {item.title}"
    if item.type != "episode" or not item.grandparentTitle:
        return item.title
    if item.index is None or item.parentIndex is None:
        return f"{item.grandparentTitle} - {item.title}"
    return f"{item.grandparentTitle} - S{item.parentIndex:02}E{item.index:02} - {item.title}"
