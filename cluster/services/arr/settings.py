"""The settings of Sonarr, Radarr and Prowlarr: a config is read whole, changed, and put back whole."""

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from cluster.services.capabilities.settings import Areas, Entry, is_list, refuse_masked, told
from cluster.services.errors import BadResponse
from cluster.services.http.client import Client

CONFIGS = ("mediamanagement", "naming", "downloadclient", "indexer", "host")
PROFILES = ("qualityprofile[]", "qualitydefinition[]", "downloadclient[]", "indexer[]")
READ_ONLY = ("health[]", "rootfolder[]", "remotepathmapping[]", "customformat[]")
FIELD = "fields."
"""How a setting is named that is one of the fields of an indexer, a download client or an application."""
NAMES = ("name", "title", "path", "remotePath", "source")


class Thing(BaseModel):
    """As much as has to be so of every answer."""

    model_config = ConfigDict(extra="allow")

    id: int | None = None
    fields: list["Setting"] | None = None


class Setting(BaseModel):
    name: Annotated[str, Field(max_length=200)]
    value: Any = None


def areas(api: str, *, writable: tuple[str, ...], readable: tuple[str, ...]) -> Areas:
    """The areas of one of them, whose API has this prefix."""

    async def read(client: Client, area: str) -> list[Entry]:
        answer = await client.get(f"{api}/{area.removesuffix('[]')}")
        if not is_list(area):
            client.read(Thing, answer)
            return [_entry("", answer)]
        client.read(list[Thing], answer)
        return [_entry(_key(area, thing), thing) for thing in answer]

    async def write(client: Client, area: str, entry: Entry, changes: Mapping[str, Any]) -> None:
        thing = entry.source.get("id")
        if not isinstance(thing, int):
            raise BadResponse(f"{client.connection.name} does not say which {area} this is.")
        # Fields that are secret are told, and taken back, as asterisks; what is beside them is not.
        refuse_masked(client, entry.source)
        await client.put(f"{api}/{quote(area.removesuffix('[]'))}/{thing}", _changed(entry.source, changes))

    return Areas(read, write, frozenset(writable), frozenset(readable))


OF_SERIES_AND_MOVIES = areas(
    "/api/v3", writable=(*(f"config/{name}" for name in CONFIGS), *PROFILES), readable=READ_ONLY
)
OF_INDEXERS = areas("/api/v1", writable=("config/host", "applications[]", "indexer[]"), readable=("health[]",))


def _key(area: str, thing: Mapping[str, Any]) -> str:
    # Findings of a service's own have no id that lasts.
    return str(thing.get("source" if area == "health[]" else "id") or "")[:200]


def _entry(key: str, thing: dict[str, Any]) -> Entry:
    fields = {f"{FIELD}{one['name']}": one.get("value") for one in thing.get("fields") or []}
    name = next((str(thing[name]) for name in NAMES if thing.get(name)), key)
    # An address is told as a text, and was to be told in parts by their documents.
    addresses = {
        one: value["fullUri"] for one, value in thing.items() if isinstance(value, dict) and "fullUri" in value
    }
    return Entry(key, name if key else "", told({**thing, **fields, **addresses}), thing)


def _changed(thing: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The thing with these changes; the rest is as it was."""
    changed = {**thing, **{name: value for name, value in changes.items() if not name.startswith(FIELD)}}
    inside = {name.removeprefix(FIELD): value for name, value in changes.items() if name.startswith(FIELD)}
    if inside:
        changed["fields"] = [
            {**one, "value": inside[one["name"]]} if one["name"] in inside else one for one in thing["fields"]
        ]
    return changed
