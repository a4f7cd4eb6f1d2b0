"""What Sonarr and Radarr collect: what is there, what could be, and how one becomes the other.

Doors and tools call the same functions. A service is asked for what it can say itself: whether something is there
already, which profiles and folders it has. It alone decides, so two who add the same at once do not both succeed.
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
"""A large collection takes its service a while."""
LOOKUP_SECONDS = 60.0
"""So does what has to be asked in the internet."""
MAX_CHOICES = 20


class NotInCollection(NotFound):
    """The service has no such thing."""

    code = "NOT_IN_COLLECTION"


class NothingFound(NotFound):
    """The service finds nothing of this name or id that could be added."""

    code = "NOTHING_FOUND"


class AmbiguousTitle(Conflict):
    """Several things are named so."""

    code = "SEVERAL_FOUND"


class AlreadyInCollection(Conflict):
    """It was added already."""

    code = "ALREADY_THERE"


class UnknownQualityProfile(InvalidRequest):
    """The service has no such quality profile."""

    code = "UNKNOWN_QUALITY_PROFILE"


class UnknownRootFolder(InvalidRequest):
    """The service has no such root folder."""

    code = "UNKNOWN_ROOT_FOLDER"


Number = Annotated[int, Field(ge=-(2**63), lt=2**63)]
"""More can be said in JSON, but not to everybody."""
Title = Annotated[str, Field(max_length=2000)]


class CollectionItem(BaseModel):
    """What every collection tells of what is in it. What a service does not say is null."""

    id: Number
    title: Title


Item = TypeVar("Item", bound=CollectionItem)


@dataclass(frozen=True)
class Collection(Generic[Item]):
    """How one service calls what it collects."""

    item_name: str  # for one of them: series
    description: str  # what a service does that has this
    path: str  # where its API has them
    item_type: type[Item]
    external_id_field: str  # the field with the id that it has in the world: tvdbId
    lookup_prefix: str  # what stands before that id where things are looked up: tvdb
    search_command: Callable[[int], dict[str, object]]  # the command that has one searched for


class QualityProfile(BaseModel):
    id: Number
    name: Title | None = None


class RootFolder(BaseModel):
    path: Title
    accessible: bool | None = None
    freeSpace: Number | None = None


class LookupResult(BaseModel):
    """Something that could be added."""

    title: Title
    year: Number | None
    outer_id: Number


@dataclass(frozen=True)
class ItemToAdd:
    """Something to add: by its id in the world, else by its title. What is None is the service's to choose."""

    title: str | None = None
    external_id: int | None = None
    year: int | None = None
    quality_profile_id: int | None = None
    root_folder_path: str | None = None
    extra_fields: Mapping[str, object] = field(default_factory=dict[str, object])  # what else is said of it


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
    """Have `take` called with what is there, in bounded memory; returns how many there are on all pages."""
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
        answer = await client.get(f"{collection.path}/{item_id}")
    except NotFoundInService as error:
        name = client.connection.name
        raise NotInCollection(f"{name} has no {collection.item_name} with the id {item_id}.") from error
    return client.parse(collection.item_type, answer)


async def look_up(client: Client, collection: Collection[Any], term: str) -> list[LookupResult]:
    """What could be added and is named like this, the likeliest first."""
    return [found for found, _ in await _look_up_rows(client, collection, term)]


async def add(client: Client, collection: Collection[Item], item_to_add: ItemToAdd) -> Item:
    """Add something. What cannot be done is refused before anything is."""
    found, row = await _find_item_to_add(client, collection, item_to_add)
    await _require_absent(client, collection, found)
    body = {
        **row,
        "qualityProfileId": await _resolve_quality_profile(client, item_to_add.quality_profile_id),
        "rootFolderPath": await _resolve_root_folder(client, item_to_add.root_folder_path),
        **item_to_add.extra_fields,
    }
    try:
        # The service looks it up once more, in the internet.
        answer = await client.post(collection.path, body, seconds=LOOKUP_SECONDS)
    except (Refused, BadResponse, Unreachable):
        await _require_absent(client, collection, found)  # another one was quicker, or its answer did not come
        raise
    return client.parse(collection.item_type, answer)


async def search(client: Client, collection: Collection[Item], item_id: int) -> tuple[Item, int]:
    """Have what is missing of it searched for; returns it, and the number of the command."""
    item = await get(client, collection, item_id)
    return item, await run_command(client, collection.search_command(item_id))


async def delete(client: Client, collection: Collection[Item], item_id: int, *, delete_files: bool) -> Item:
    item = await get(client, collection, item_id)
    await client.delete(f"{collection.path}/{item_id}", deleteFiles=delete_files)
    return item


async def run_command(client: Client, body: Mapping[str, object]) -> int:
    """Have the service do something on its own; returns the number of the command."""
    return client.parse(_Command, await client.post(f"{API}/command", body)).id


def format_command_id(command_number: int) -> str:
    """How a command is called to people: numbers are ids of all sorts of things."""
    return f"cmd_{command_number}"


def to_choice(collection: Collection[Any], found: LookupResult) -> dict[str, object]:
    """What could be added, as it is told."""
    return {"title": found.title, "year": found.year, collection.external_id_field: found.outer_id}


async def quality_profiles(client: Client) -> list[QualityProfile]:
    return client.parse(list[QualityProfile], await client.get(f"{API}/qualityprofile"))


async def root_folders(client: Client) -> list[RootFolder]:
    return client.parse(list[RootFolder], await client.get(f"{API}/rootfolder"))


async def _find_item_to_add(
    client: Client, collection: Collection[Any], item_to_add: ItemToAdd
) -> tuple[LookupResult, dict[str, Any]]:
    """The one thing that is wanted, and all that the service knows of it."""
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
        raise _ambiguous_title(client, collection, title, [found for found, _ in candidates])
    return candidates[0]


async def _look_up_rows(
    client: Client, collection: Collection[Any], term: str
) -> list[tuple[LookupResult, dict[str, Any]]]:
    answer = await client.get(f"{collection.path}/lookup", seconds=LOOKUP_SECONDS, term=term)
    rows = client.parse(list[dict[str, Any]], answer)
    found: list[tuple[LookupResult, dict[str, Any]]] = []
    for row in rows:
        fields = {"title": row.get("title"), "year": row.get("year"), "outer_id": row.get(collection.external_id_field)}
        # The id is that of what is in the collection already.
        found.append((client.parse(LookupResult, fields), {name: value for name, value in row.items() if name != "id"}))
    return found


async def _require_absent(client: Client, collection: Collection[Any], found: LookupResult) -> None:
    answer = await client.get(collection.path, **{collection.external_id_field: found.outer_id})
    for row in client.parse(list[dict[str, Any]], answer):
        if row.get(collection.external_id_field) == found.outer_id:
            item: CollectionItem = client.parse(collection.item_type, row)
            name = client.connection.name
            raise AlreadyInCollection(f"'{item.title}' is in {name} already: {item.id}.", details={"id": item.id})


async def _resolve_quality_profile(client: Client, profile_id: int | None) -> int:
    name, profiles = client.connection.name, await quality_profiles(client)
    ids = [profile.id for profile in profiles]
    if not ids:
        raise UnknownQualityProfile(f"{name} has no quality profile: make one there first.")
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
        raise UnknownRootFolder(f"{name} has no root folder: make one there first.")
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
    client: Client, collection: Collection[Any], title: str, found: list[LookupResult]
) -> AmbiguousTitle:
    choices = found[:MAX_CHOICES]
    listing = ", ".join(
        f"{_with_year(result)} ({collection.external_id_field} {result.outer_id})" for result in choices
    )
    return AmbiguousTitle(
        f"{client.connection.name} finds several that '{title}' could mean: {listing}. Say which by its id.",
        details={"choices": [to_choice(collection, result) for result in choices]},
    )


def _with_year(found: LookupResult) -> str:
    return f"{found.title} ({found.year})" if found.year else found.title


def _strip_trailing_slash(path: str) -> str:
    """Whether a folder is written with a slash at its end is all one."""
    return path.rstrip("/\\") or path
