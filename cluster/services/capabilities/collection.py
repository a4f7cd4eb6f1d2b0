"""What Sonarr and Radarr collect: what is there, what could be, and how one becomes the other.

Doors and tools call the same functions. A service is asked for what it can say itself: whether something is there
already, which profiles and folders it has. It alone decides, so two who add the same at once do not both succeed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, TypeVar

from pydantic import BaseModel, Field

from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.services.errors import BadResponse, NotThere, Refused, Unreachable
from cluster.services.http.client import Client

API = "/api/v3"
ID_MAX = 2**31 - 1
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


class SeveralFound(Conflict):
    """Several things are named so."""

    code = "SEVERAL_FOUND"


class AlreadyThere(Conflict):
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


class Thing(BaseModel):
    """What every collection tells of what is in it. What a service does not say is null."""

    id: Number
    title: Title


Kept = TypeVar("Kept", bound=Thing)


@dataclass(frozen=True)
class Collection(Generic[Kept]):
    """How one service calls what it collects."""

    word: str  # for one of them: series
    does: str  # what a service does that has this
    path: str  # where its API has them
    thing: type[Kept]
    outer_id: str  # the field with the id that it has in the world: tvdbId
    term: str  # what stands before that id where things are looked up: tvdb
    search: Callable[[int], dict[str, object]]  # the command that has one searched for


class QualityProfile(BaseModel):
    id: Number
    name: Title | None = None


class RootFolder(BaseModel):
    path: Title
    accessible: bool | None = None
    freeSpace: Number | None = None


class Found(BaseModel):
    """Something that could be added."""

    title: Title
    year: Number | None
    outer_id: Number


@dataclass(frozen=True)
class Wanted:
    """Something to add: by its id in the world, else by its title. What is None is the service's to choose."""

    title: str | None = None
    outer_id: int | None = None
    year: int | None = None
    quality_profile_id: int | None = None
    root_folder_path: str | None = None
    fields: Mapping[str, object] = field(default_factory=dict[str, object])  # what else is said of it


class _Command(BaseModel):
    id: Number


async def each(
    client: Client,
    collection: Collection[Kept],
    take: Callable[[Kept], None],
    *,
    query: str | None = None,
    offset: int = 0,
    limit: int | None = None,
) -> int:
    """Have `take` called with what is there, in bounded memory; returns how many there are on all pages."""
    wanted, total = (query or "").casefold(), 0

    def look(row: dict[str, Any]) -> None:
        nonlocal total
        thing = client.read(collection.thing, row)
        if wanted not in thing.title.casefold():
            return
        if offset <= total and (limit is None or total < offset + limit):
            take(thing)
        total += 1

    await client.each(collection.path, look, seconds=LIST_SECONDS)
    return total


async def get(client: Client, collection: Collection[Kept], thing_id: int) -> Kept:
    try:
        answer = await client.get(f"{collection.path}/{thing_id}")
    except NotThere as error:
        name = client.connection.name
        raise NotInCollection(f"{name} has no {collection.word} with the id {thing_id}.") from error
    return client.read(collection.thing, answer)


async def look_up(client: Client, collection: Collection[Any], term: str) -> list[Found]:
    """What could be added and is named like this, the likeliest first."""
    return [found for found, _ in await _looked_up(client, collection, term)]


async def add(client: Client, collection: Collection[Kept], wanted: Wanted) -> Kept:
    """Add something. What cannot be done is refused before anything is."""
    found, row = await _find(client, collection, wanted)
    await _refuse_if_there(client, collection, found)
    body = {
        **row,
        "qualityProfileId": await _quality_profile(client, wanted.quality_profile_id),
        "rootFolderPath": await _root_folder(client, wanted.root_folder_path),
        **wanted.fields,
    }
    try:
        # The service looks it up once more, in the internet.
        answer = await client.post(collection.path, body, seconds=LOOKUP_SECONDS)
    except (Refused, BadResponse, Unreachable):
        await _refuse_if_there(client, collection, found)  # another one was quicker, or its answer did not come
        raise
    return client.read(collection.thing, answer)


async def search(client: Client, collection: Collection[Kept], thing_id: int) -> tuple[Kept, int]:
    """Have what is missing of it searched for; returns it, and the number of the command."""
    thing = await get(client, collection, thing_id)
    return thing, await command(client, collection.search(thing_id))


async def delete(client: Client, collection: Collection[Kept], thing_id: int, *, delete_files: bool) -> Kept:
    thing = await get(client, collection, thing_id)
    await client.delete(f"{collection.path}/{thing_id}", deleteFiles=delete_files)
    return thing


async def command(client: Client, body: Mapping[str, object]) -> int:
    """Have the service do something on its own; returns the number of the command."""
    return client.read(_Command, await client.post(f"{API}/command", body)).id


def command_name(number: int) -> str:
    """How a command is called to people: numbers are ids of all sorts of things."""
    return f"cmd_{number}"


def choice(collection: Collection[Any], found: Found) -> dict[str, object]:
    """What could be added, as it is told."""
    return {"title": found.title, "year": found.year, collection.outer_id: found.outer_id}


async def quality_profiles(client: Client) -> list[QualityProfile]:
    return client.read(list[QualityProfile], await client.get(f"{API}/qualityprofile"))


async def root_folders(client: Client) -> list[RootFolder]:
    return client.read(list[RootFolder], await client.get(f"{API}/rootfolder"))


async def _find(client: Client, collection: Collection[Any], wanted: Wanted) -> tuple[Found, dict[str, Any]]:
    """The one thing that is wanted, and all that the service knows of it."""
    name = client.connection.name
    if wanted.outer_id is not None:
        rows = await _looked_up(client, collection, f"{collection.term}:{wanted.outer_id}")
        same = [row for row in rows if row[0].outer_id == wanted.outer_id]
        if not same:
            raise NothingFound(f"{name} finds no {collection.word} with the {collection.outer_id} {wanted.outer_id}.")
        return same[0]
    title = wanted.title or ""
    rows = await _looked_up(client, collection, title)
    if wanted.year is not None:
        rows = [row for row in rows if row[0].year == wanted.year]
    named = [row for row in rows if title.casefold() in {row[0].title.casefold(), _with_year(row[0]).casefold()}]
    fitting = named or rows
    if not fitting:
        raise NothingFound(f"{name} finds no {collection.word} named '{title}'.")
    if len(fitting) > 1:
        raise _several(client, collection, title, [found for found, _ in fitting])
    return fitting[0]


async def _looked_up(client: Client, collection: Collection[Any], term: str) -> list[tuple[Found, dict[str, Any]]]:
    answer = await client.get(f"{collection.path}/lookup", seconds=LOOKUP_SECONDS, term=term)
    rows = client.read(list[dict[str, Any]], answer)
    found: list[tuple[Found, dict[str, Any]]] = []
    for row in rows:
        shown = {"title": row.get("title"), "year": row.get("year"), "outer_id": row.get(collection.outer_id)}
        # The id is that of what is in the collection already.
        found.append((client.read(Found, shown), {name: value for name, value in row.items() if name != "id"}))
    return found


async def _refuse_if_there(client: Client, collection: Collection[Any], found: Found) -> None:
    answer = await client.get(collection.path, **{collection.outer_id: found.outer_id})
    for row in client.read(list[dict[str, Any]], answer):
        if row.get(collection.outer_id) == found.outer_id:
            thing: Thing = client.read(collection.thing, row)
            name = client.connection.name
            raise AlreadyThere(f"'{thing.title}' is in {name} already: {thing.id}.", details={"id": thing.id})


async def _quality_profile(client: Client, wanted: int | None) -> int:
    name, profiles = client.connection.name, await quality_profiles(client)
    ids = [profile.id for profile in profiles]
    if not ids:
        raise UnknownQualityProfile(f"{name} has no quality profile: make one there first.")
    if wanted is not None and wanted not in ids:
        choices = [profile.model_dump() for profile in profiles[:MAX_CHOICES]]
        named = ", ".join(f"{profile.id} ({profile.name})" for profile in profiles[:MAX_CHOICES])
        raise UnknownQualityProfile(
            f"{name} has no quality profile {wanted}. There are: {named}.",
            details={"quality_profile_id": f"must be one of {named}", "choices": choices},
        )
    return ids[0] if wanted is None else wanted


async def _root_folder(client: Client, wanted: str | None) -> str:
    name, folders = client.connection.name, await root_folders(client)
    if not folders:
        raise UnknownRootFolder(f"{name} has no root folder: make one there first.")
    if wanted is None:
        return next((folder.path for folder in folders if folder.accessible is not False), folders[0].path)
    same = [folder.path for folder in folders if _bare(folder.path) == _bare(wanted)]
    if not same:
        paths = [folder.path for folder in folders[:MAX_CHOICES]]
        raise UnknownRootFolder(
            f"{name} has no root folder '{wanted}'. There are: {', '.join(paths)}.",
            details={"root_folder_path": f"must be one of {', '.join(paths)}", "choices": paths},
        )
    return same[0]


def _several(client: Client, collection: Collection[Any], title: str, found: list[Found]) -> SeveralFound:
    choices = found[:MAX_CHOICES]
    named = ", ".join(f"{_with_year(one)} ({collection.outer_id} {one.outer_id})" for one in choices)
    return SeveralFound(
        f"{client.connection.name} finds several that '{title}' could mean: {named}. Say which by its id.",
        details={"choices": [choice(collection, one) for one in choices]},
    )


def _with_year(found: Found) -> str:
    return f"{found.title} ({found.year})" if found.year else found.title


def _bare(path: str) -> str:
    """Whether a folder is written with a slash at its end is all one."""
    return path.rstrip("/\\") or path
