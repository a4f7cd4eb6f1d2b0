"""What Sonarr, Radarr and Prowlarr have in common: how they are made, they are brothers."""

from typing import Any

from cluster.services.capabilities.collection import Collection
from cluster.services.capabilities.download_tracking import Following
from cluster.services.capabilities.settings import Areas
from cluster.services.connector import Capability, Connector, Tool
from cluster.services.http.api_key import Key
from cluster.services.http.client import Client

HELP = "Settings, General, Security: API Key."


def connector(
    name: str,
    title: str,
    api: str,
    *capabilities: Capability,
    collection: Collection[Any] | None = None,
    tools: tuple[Tool, ...] = (),
    following: Following | None = None,
    settings: Areas | None = None,
) -> Connector:
    """The connector of one of them, whose API has this prefix."""

    async def health(client: Client) -> str:
        status = client.expect(await client.get(f"{api}/system/status"), "appName", "version")
        if status["appName"] != title:
            raise client.wrong(status["appName"])
        return str(status["version"])

    return Connector(
        type=name,
        title=title,
        capabilities=frozenset({"health", *capabilities}),
        health=health,
        key=Key(header="X-Api-Key"),
        key_help=HELP,
        collection=collection,
        tools=tools,
        following=following,
        settings=settings,
    )
