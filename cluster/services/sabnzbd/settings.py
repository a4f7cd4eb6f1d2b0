"""The settings of SABnzbd: sections, of which some are lists. It takes what it does not understand as something else,
and says that it has done so, so that whoever writes has to read it back."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from cluster.services.capabilities.settings import Areas, Entry, is_list, told
from cluster.services.errors import BadResponse, NotThere
from cluster.services.http.client import Client


class Answer(BaseModel):
    config: dict[str, Any]


class Named(BaseModel):
    name: str


async def read(client: Client, area: str) -> list[Entry]:
    section = area.removesuffix("[]")
    answer = await client.get("/api", mode="get_config", output="json", section=section)
    config = client.read(Answer, answer).config
    if not is_list(area):
        if section not in config:
            raise BadResponse(f"{client.connection.name} does not tell its settings.")
        return [Entry("", "", told(client.read(dict[str, Any], config[section])))]
    things = config.get(section, [])  # it does not name a list that is empty
    client.read(list[Named], things)
    return [Entry(thing["name"], thing["name"], told(thing)) for thing in things]


async def write(client: Client, area: str, entry: Entry, changes: Mapping[str, Any]) -> None:
    sent = {name: _said(value) for name, value in changes.items()}
    if not is_list(area):
        for name, value in sent.items():
            await _set(client, section=area, keyword=name, value=value)
        return
    # It would make a new one of a name that it does not know.
    if not any(known.key == entry.key for known in await read(client, area)):
        raise NotThere(f"{client.connection.name} has no '{entry.name}' among its {area.removesuffix('[]')} any more.")
    await _set(client, section=area.removesuffix("[]"), keyword=entry.key, **sent)


AREAS = Areas(read, write, writable=frozenset({"misc", "categories[]", "sorters[]"}), readable=frozenset({"servers[]"}))


async def _set(client: Client, **sent: Any) -> None:
    await client.act("/api", mode="set_config", output="json", **sent)


def _said(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_said, value))
    return str(int(value)) if isinstance(value, bool) else "" if value is None else str(value)
