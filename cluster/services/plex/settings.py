"""The settings of Plex: one list of them all."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, Field

from cluster.services.capabilities.settings import Areas, Entry, told
from cluster.services.http.client import Client

PATH = "/:/prefs"


class Preference(BaseModel):
    id: str
    value: Any = None


class Preferences(BaseModel):
    preferences: list[Preference] = Field(alias="Setting")


class Answer(BaseModel):
    container: Preferences = Field(alias="MediaContainer")


async def read(client: Client, area: str) -> list[Entry]:
    answer = client.read(Answer, await client.get(PATH))
    return [Entry("", "", told({one.id: one.value for one in answer.container.preferences}))]


async def write(client: Client, area: str, entry: Entry, changes: Mapping[str, Any]) -> None:
    sent = {name: int(value) if isinstance(value, bool) else value for name, value in changes.items()}
    await client.put(PATH, None, **sent)


AREAS = Areas(read, write, writable=frozenset({"prefs"}))
