"""Build the connectors of Sonarr, Radarr and Prowlarr, which have the same status API and key."""

from typing import Any

from cluster.services.capabilities.collection import Collection
from cluster.services.capabilities.download_tracking import DownloadTracker
from cluster.services.capabilities.settings import SettingsAreas
from cluster.services.connector import Capability, Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Tool

KEY_HELP = "Settings, General, Security: API Key."


def connector(
    name: str,
    title: str,
    api: str,
    *capabilities: Capability,
    collection: Collection[Any] | None = None,
    tools: tuple[Tool[Client], ...] = (),
    download_tracker: DownloadTracker | None = None,
    settings: SettingsAreas | None = None,
) -> Connector:
    """Build the connector of one of them. `api` is the prefix of its API."""

    async def health(client: Client) -> str:
        status = client.require_keys(await client.get(f"{api}/system/status"), "appName", "version")
        if status["appName"] != title:
            raise client.wrong_service(status["appName"])
        return str(status["version"])

    return Connector(
        type=name,
        title=title,
        capabilities=frozenset({"health", *capabilities}),
        health=health,
        key_scheme=ApiKeyScheme(header="X-Api-Key"),
        key_help=KEY_HELP,
        collection=collection,
        tools=tools,
        download_tracker=download_tracker,
        settings=settings,
    )
