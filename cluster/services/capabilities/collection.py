"""The capability to manage a collection of series or movies: list, look up, add, search and delete items.

Routes and tools call the same functions. Nothing is cached: the service is asked which items, profiles and folders it
has. It alone decides, so if two callers add the same item at the same time, only one succeeds.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field

from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.services.errors import BadResponse, NotFoundInService, Refused, Unreachable
from cluster.services.http.client import Client

API = "/api/v3"
MAX_ID = 2**31 - 1
LIST_SECONDS = 120.0
"""A service needs long to list a large collection."""
LOOKUP_SECONDS = 60.0
"""For a lookup, the service sends requests to the internet."""
MAX_CHOICES = 20


class NotInCollection(NotFound):
    """The service has no such item."""

    code = "NOT_IN_COLLECTION"


class NothingFound(NotFound):
    """The service finds no item with this title or id."""

    code = "NOTHING_FOUND"


class AmbiguousTitle(Conflict):
    """The service finds more than one item with this title."""

    code = "SEVERAL_FOUND"


class AlreadyInCollection(Conflict):
    """The service has this item already."""

    code = "ALREADY_THERE"


class UnknownQualityProfile(InvalidRequest):
    """The service has no such quality profile."""

    code = "UNKNOWN_QUALITY_PROFILE"


class UnknownRootFolder(InvalidRequest):
    """The service has no such root folder."""

    code = "UNKNOWN_ROOT_FOLDER"


Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""JSON allows larger numbers, but many clients cannot read them."""
Title = Annotated[str, Field(max_length=2000)]


class CollectionItem(BaseModel):
    """An item of a collection. Fields that the service does not send are null."""

    id: Number
    title: Title


Item = TypeVar("Item", bound=CollectionItem)


@dataclass(frozen=True)
class Collection(Generic[Item]):
    """The names that a service's API has for its items."""

    item_name: str  # one item, in messages: series
    description: str  # what the service does, in messages: collects series
    path: str  # of the items in its API
    item_type: type[Item]
    external_id_field: str  # the field with the id in a public database: tvdbId
    lookup_prefix: str  # precedes that id in a lookup: tvdb
    search_command: Callable[[int], dict[str, object]]  # the command that searches for releases of an item


class QualityProfile(BaseModel):
    id: Number
    name: Title | None = None


class RootFolder(BaseModel):
    path: Title
    accessible: bool | None = None
    freeSpace: Number | None = None


class LookupResult(BaseModel):
    """An item that could be added."""

    title: Title
    year: Number | None
    outer_id: Number


@dataclass(frozen=True)
class ItemToAdd:
    """An item to add, named by its external id, else by its title. None: the service's default."""

    title: str | None = None
    external_id: int | None = None
    year: int | None = None
    quality_profile_id: int | None = None
    root_folder_path: str | None = None
    extra_fields: Mapping[str, object] = field(default_factory=dict[str, object])  # that only this service has


class _Command(BaseModel):
    id: Number


async def for_each_item(
    client: Client,
    collection: Collection[Item],
    on_item: Callable[[Item], None],
    *,
    query: str | None = None,
    offset: int = 0,
    limit: int | None = None,
) -> int:
    """Call `on_item` with the items of a page, in bounded memory. Returns the number of items on all pages."""
    needle, total = (query or "").casefold(), 0

    def handle_row(row: dict[str, Any]) -> None:
        nonlocal total
        item = client.parse(collection.item_type, row)
        if needle not in item.title.casefold():
            return
        if offset <= total and (limit is None or total < offset + limit):
            on_item(item)
        total += 1

    await client.for_each_item(collection.path, handle_row, seconds=LIST_SECONDS)
    return total


async def get(client: Client, collection: Collection[Item], item_id: int) -> Item:
    try:
        response = await client.get(f"{collection.path}/{item_id}")
    except NotFoundInService as error:
        name = client.connection.name
        raise NotInCollection(f"{name} has no {collection.item_name} with the id {item_id}.") from error
    return client.parse(collection.item_type, response)


async def look_up(client: Client, collection: Collection[Any], term: str) -> list[LookupResult]:
    """Return the items that match and could be added, best match first."""
    return [result for result, _ in await _look_up_rows(client, collection, term)]


async def add(client: Client, collection: Collection[Item], item_to_add: ItemToAdd) -> Item:
    """Add an item. The request is checked completely before the service changes anything."""
    result, row = await _find_item_to_add(client, collection, item_to_add)
    await _require_absent(client, collection, result)
    body = {
        **row,
        "qualityProfileId": await _resolve_quality_profile(client, item_to_add.quality_profile_id),
        "rootFolderPath": await _resolve_root_folder(client, item_to_add.root_folder_path),
        **item_to_add.extra_fields,
    }
    try:
        # The service looks the item up again, in the internet.
        response = await client.post(collection.path, body, seconds=LOOKUP_SECONDS)
    except (Refused, BadResponse, Unreachable):
        # Another caller may have added it first, or the response was lost.
        await _require_absent(client, collection, result)
        raise
    return client.parse(collection.item_type, response)


async def search(client: Client, collection: Collection[Item], item_id: int) -> tuple[Item, int]:
    """Start a search for releases of an item. Returns the item, and the number of the command."""
    item = await get(client, collection, item_id)
    return item, await run_command(client, collection.search_command(item_id))


async def delete(client: Client, collection: Collection[Item], item_id: int, *, delete_files: bool) -> Item:
    item = await get(client, collection, item_id)
    await client.delete(f"{collection.path}/{item_id}", deleteFiles=delete_files)
    return item


async def run_command(client: Client, body: Mapping[str, object]) -> int:
    """Start a command in the service, and return its number."""
    return client.parse(_Command, await client.post(f"{API}/command", body)).id


def format_command_id(command_number: int) -> str:
    """Return the public id of a command. Its prefix distinguishes it from other ids."""
    return f"cmd_{command_number}"


def to_choice(collection: Collection[Any], result: LookupResult) -> dict[str, object]:
    """Return the public form of a lookup result."""
    return {"title": result.title, "year": result.year, collection.external_id_field: result.outer_id}


async def quality_profiles(client: Client) -> list[QualityProfile]:
    return client.parse(list[QualityProfile], await client.get(f"{API}/qualityprofile"))


async def root_folders(client: Client) -> list[RootFolder]:
    return client.parse(list[RootFolder], await client.get(f"{API}/rootfolder"))


async def _find_item_to_add(
    client: Client, collection: Collection[Any], item_to_add: ItemToAdd
) -> tuple[LookupResult, dict[str, Any]]:
    """Find the item to add. Returns it, and its whole row from the service."""
    name = client.connection.name
    if item_to_add.external_id is not None:
        rows = await _look_up_rows(client, collection, f"{collection.lookup_prefix}:{item_to_add.external_id}")
        exact_matches = [row for row in rows if row[0].outer_id == item_to_add.external_id]
        if not exact_matches:
            raise NothingFound(
                f"{name} finds no {collection.item_name} whose {collection.external_id_field} "
                f"is {item_to_add.external_id}."
            )
        return exact_matches[0]
    title = item_to_add.title or ""
    rows = await _look_up_rows(client, collection, title)
    if item_to_add.year is not None:
        rows = [row for row in rows if row[0].year == item_to_add.year]
    title_matches = [
        row for row in rows if title.casefold() in {row[0].title.casefold(), _with_year(row[0]).casefold()}
    ]
    candidates = title_matches or rows
    if not candidates:
        raise NothingFound(f"{name} finds no {collection.item_name} named '{title}'.")
    if len(candidates) > 1:
        raise _ambiguous_title(client, collection, title, [result for result, _ in candidates])
    return candidates[0]


async def _look_up_rows(
    client: Client, collection: Collection[Any], term: str
) -> list[tuple[LookupResult, dict[str, Any]]]:
    response = await client.get(f"{collection.path}/lookup", seconds=LOOKUP_SECONDS, term=term)
    rows = client.parse(list[dict[str, Any]], response)
    results: list[tuple[LookupResult, dict[str, Any]]] = []
    for row in rows:
        fields = {"title": row.get("title"), "year": row.get("year"), "outer_id": row.get(collection.external_id_field)}
        # A row has an id if its item is in the collection already.
        row_without_id = {name: value for name, value in row.items() if name != "id"}
        results.append((client.parse(LookupResult, fields), row_without_id))
    return results


async def _require_absent(client: Client, collection: Collection[Any], result: LookupResult) -> None:
    response = await client.get(collection.path, **{collection.external_id_field: result.outer_id})
    for row in client.parse(list[dict[str, Any]], response):
        if row.get(collection.external_id_field) == result.outer_id:
            item: CollectionItem = client.parse(collection.item_type, row)
            message = f"'{item.title}' is in {client.connection.name} already, with the id {item.id}."
            raise AlreadyInCollection(message, details={"id": item.id})


async def _resolve_quality_profile(client: Client, profile_id: int | None) -> int:
    name, profiles = client.connection.name, await quality_profiles(client)
    ids = [profile.id for profile in profiles]
    if not ids:
        raise UnknownQualityProfile(f"{name} has no quality profile: create one there first.")
    if profile_id is not None and profile_id not in ids:
        choices = [profile.model_dump() for profile in profiles[:MAX_CHOICES]]
        listing = ", ".join(f"{profile.id} ({profile.name})" for profile in profiles[:MAX_CHOICES])
        raise UnknownQualityProfile(
            f"{name} has no quality profile {profile_id}. There are: {listing}.",
            details={"quality_profile_id": f"must be one of {listing}", "choices": choices},
        )
    return ids[0] if profile_id is None else profile_id


async def _resolve_root_folder(client: Client, path: str | None) -> str:
    name, folders = client.connection.name, await root_folders(client)
    if not folders:
        raise UnknownRootFolder(f"{name} has no root folder: create one there first.")
    if path is None:
        return next((folder.path for folder in folders if folder.accessible is not False), folders[0].path)
    matches = [folder.path for folder in folders if _strip_trailing_slash(folder.path) == _strip_trailing_slash(path)]
    if not matches:
        paths = [folder.path for folder in folders[:MAX_CHOICES]]
        raise UnknownRootFolder(
            f"{name} has no root folder '{path}'. There are: {', '.join(paths)}.",
            details={"root_folder_path": f"must be one of {', '.join(paths)}", "choices": paths},
        )
    return matches[0]


def _ambiguous_title(
    client: Client, collection: Collection[Any], title: str, results: list[LookupResult]
) -> AmbiguousTitle:
    choices = results[:MAX_CHOICES]
    listing = ", ".join(
        f"{_with_year(result)} ({collection.external_id_field} {result.outer_id})" for result in choices
    )
    return AmbiguousTitle(
        f"{client.connection.name} finds more than one match for '{title}': {listing}. Name one by its id.",
        details={"choices": [to_choice(collection, result) for result in choices]},
    )


def _with_year(result: LookupResult) -> str:
    return f"{result.title} ({result.year})" if result.year else result.title


def _strip_trailing_slash(path: str) -> str:
    return path.rstrip("/\\") or path
