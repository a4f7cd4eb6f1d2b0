"""Read and write the settings of SABnzbd: sections, some of which are lists.

SABnzbd stores another value for one that it does not understand, and reports success. So a caller that writes must read
the settings again.
"""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from cluster.services.capabilities.settings import SettingsAreas, SettingsEntry, is_list, mask_secrets
from cluster.services.errors import BadResponse, NotFoundInService
from cluster.services.http.client import Client


class ConfigResponse(BaseModel):
    config: dict[str, Any]


class NamedRecord(BaseModel):
    name: str


async def read(client: Client, area: str) -> list[SettingsEntry]:
    section = area.removesuffix("[]")
    response = await client.get("/api", mode="get_config", output="json", section=section)
    config = client.parse(ConfigResponse, response).config
    if not is_list(area):
        if section not in config:
            raise BadResponse(f"{client.connection.name} does not return its settings.")
        return [SettingsEntry("", "", mask_secrets(client.parse(dict[str, Any], config[section])))]
    records = config.get(section, [])  # SABnzbd omits an empty list
    client.parse(list[NamedRecord], records)
    return [SettingsEntry(record["name"], record["name"], mask_secrets(record)) for record in records]


async def write(client: Client, area: str, entry: SettingsEntry, changes: Mapping[str, Any]) -> None:
    encoded = {name: _to_config_value(value) for name, value in changes.items()}
    if not is_list(area):
        for name, value in encoded.items():
            await _set_config(client, section=area, keyword=name, value=value)
        return
    # For an unknown name, SABnzbd would create a new record.
    if not any(existing.key == entry.key for existing in await read(client, area)):
        raise NotFoundInService(
            f"{client.connection.name} no longer has '{entry.name}' among its {area.removesuffix('[]')}."
        )
    await _set_config(client, section=area.removesuffix("[]"), keyword=entry.key, **encoded)


SETTINGS_AREAS = SettingsAreas(
    read, write, writable=frozenset({"misc", "categories[]", "sorters[]"}), readable=frozenset({"servers[]"})
)


async def _set_config(client: Client, **parameters: Any) -> None:
    await client.get_once("/api", mode="set_config", output="json", **parameters)


def _to_config_value(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_to_config_value, value))
    return str(int(value)) if isinstance(value, bool) else "" if value is None else str(value)
