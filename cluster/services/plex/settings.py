"""Read and write the settings of Plex, which are one area."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from cluster.services.capabilities.settings import SettingsAreas, SettingsEntry, mask_secrets
from cluster.services.http.client import Client

PATH = "/:/prefs"


class Preference(BaseModel):
    id: str
    value: Any = None


class Preferences(BaseModel):
    preferences: list[Preference] = Field(alias="Setting")


class PreferencesResponse(BaseModel):
    container: Preferences = Field(alias="MediaContainer")


async def read(client: Client, area: str) -> list[SettingsEntry]:
    response = client.parse(PreferencesResponse, await client.get(PATH))
    return [
        SettingsEntry(
            "", "", mask_secrets({preference.id: preference.value for preference in response.container.preferences})
        )
    ]


async def write(client: Client, area: str, entry: SettingsEntry, changes: Mapping[str, Any]) -> None:
    encoded = {name: int(value) if isinstance(value, bool) else value for name, value in changes.items()}
    await client.put(PATH, None, **encoded)


SETTINGS_AREAS = SettingsAreas(read, write, writable=frozenset({"prefs"}))
