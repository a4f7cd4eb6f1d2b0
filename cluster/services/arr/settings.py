"""Read and write the settings of Sonarr, Radarr and Prowlarr. A record is always written as a whole."""

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict, Field

from cluster.services.capabilities.settings import SettingsAreas, SettingsEntry, is_list, mask_secrets, reject_masked
from cluster.services.errors import BadResponse
from cluster.services.http.client import Client

CONFIG_NAMES = ("mediamanagement", "naming", "downloadclient", "indexer", "host")
WRITABLE_LISTS = ("qualityprofile[]", "qualitydefinition[]", "downloadclient[]", "indexer[]")
READ_ONLY_AREAS = ("health[]", "rootfolder[]", "remotepathmapping[]", "customformat[]")
FIELD_PREFIX = "fields."
"""The prefix of settings that are in the list `fields` of an indexer, a download client or an application."""
NAME_KEYS = ("name", "title", "path", "remotePath", "source")


class SettingsRecord(BaseModel):
    """What every record must have; it may have more."""

    model_config = ConfigDict(extra="allow")

    id: int | None = None
    fields: list["Setting"] | None = None


class Setting(BaseModel):
    name: Annotated[str, Field(max_length=200)]
    value: Any = None


def settings_areas(api: str, *, writable: tuple[str, ...], readable: tuple[str, ...]) -> SettingsAreas:
    """Build the settings areas of one of them. `api` is the prefix of its API."""

    async def read(client: Client, area: str) -> list[SettingsEntry]:
        response = await client.get(f"{api}/{area.removesuffix('[]')}")
        if not is_list(area):
            client.parse(SettingsRecord, response)
            return [_to_entry("", response)]
        client.parse(list[SettingsRecord], response)
        return [_to_entry(_record_key(area, record), record) for record in response]

    async def write(client: Client, area: str, entry: SettingsEntry, changes: Mapping[str, Any]) -> None:
        record_id = entry.raw.get("id")
        if not isinstance(record_id, int):
            raise BadResponse(f"{client.connection.name} has sent no id for an entry of {area}.")
        # The service keeps a secret in `fields` if it gets asterisks for it, but not one outside of `fields`.
        reject_masked(client, entry.raw)
        await client.put(f"{api}/{quote(area.removesuffix('[]'))}/{record_id}", _with_changes(entry.raw, changes))

    return SettingsAreas(read, write, frozenset(writable), frozenset(readable))


SERIES_AND_MOVIES_AREAS = settings_areas(
    "/api/v3", writable=(*(f"config/{name}" for name in CONFIG_NAMES), *WRITABLE_LISTS), readable=READ_ONLY_AREAS
)
INDEXERS_AREAS = settings_areas(
    "/api/v1", writable=("config/host", "applications[]", "indexer[]"), readable=("health[]",)
)


def _record_key(area: str, record: Mapping[str, Any]) -> str:
    # A health message has no permanent id.
    return str(record.get("source" if area == "health[]" else "id") or "")[:200]


def _to_entry(key: str, record: dict[str, Any]) -> SettingsEntry:
    fields = {f"{FIELD_PREFIX}{item['name']}": item.get("value") for item in record.get("fields") or []}
    name = next((str(record[name]) for name in NAME_KEYS if record.get(name)), key)
    # A URL is sent as text, but as an object with its parts according to the services' documentation.
    addresses = {
        item: value["fullUri"] for item, value in record.items() if isinstance(value, dict) and "fullUri" in value
    }
    return SettingsEntry(key, name if key else "", mask_secrets({**record, **fields, **addresses}), record)


def _with_changes(record: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with these changes."""
    changed = {**record, **{name: value for name, value in changes.items() if not name.startswith(FIELD_PREFIX)}}
    field_changes = {
        name.removeprefix(FIELD_PREFIX): value for name, value in changes.items() if name.startswith(FIELD_PREFIX)
    }
    if field_changes:
        changed["fields"] = [
            {**field, "value": field_changes[field["name"]]} if field["name"] in field_changes else field
            for field in record["fields"]
        ]
    return changed
