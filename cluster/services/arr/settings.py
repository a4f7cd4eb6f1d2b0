"""The settings of Sonarr, Radarr and Prowlarr: a config is read whole, changed, and put back whole."""

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
"""How a setting is named that is one of the fields of an indexer, a download client or an application."""
NAME_KEYS = ("name", "title", "path", "remotePath", "source")


class SettingsRecord(BaseModel):
    """As much as has to be so of every answer."""

    model_config = ConfigDict(extra="allow")

    id: int | None = None
    fields: list["Setting"] | None = None


class Setting(BaseModel):
    name: Annotated[str, Field(max_length=200)]
    value: Any = None


def settings_areas(api: str, *, writable: tuple[str, ...], readable: tuple[str, ...]) -> SettingsAreas:
    """The areas of one of them, whose API has this prefix."""

    async def read(client: Client, area: str) -> list[SettingsEntry]:
        answer = await client.get(f"{api}/{area.removesuffix('[]')}")
        if not is_list(area):
            client.parse(SettingsRecord, answer)
            return [_to_entry("", answer)]
        client.parse(list[SettingsRecord], answer)
        return [_to_entry(_record_key(area, record), record) for record in answer]

    async def write(client: Client, area: str, entry: SettingsEntry, changes: Mapping[str, Any]) -> None:
        record_id = entry.raw.get("id")
        if not isinstance(record_id, int):
            raise BadResponse(f"{client.connection.name} does not say which {area} this is.")
        # Fields that are secret are told, and taken back, as asterisks; what is beside them is not.
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
    # Findings of a service's own have no id that lasts.
    return str(record.get("source" if area == "health[]" else "id") or "")[:200]


def _to_entry(key: str, record: dict[str, Any]) -> SettingsEntry:
    fields = {f"{FIELD_PREFIX}{item['name']}": item.get("value") for item in record.get("fields") or []}
    name = next((str(record[name]) for name in NAME_KEYS if record.get(name)), key)
    # An address is told as a text, and was to be told in parts by their documents.
    addresses = {
        item: value["fullUri"] for item, value in record.items() if isinstance(value, dict) and "fullUri" in value
    }
    return SettingsEntry(key, name if key else "", mask_secrets({**record, **fields, **addresses}), record)


def _with_changes(record: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """The thing with these changes; the rest is as it was."""
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
