"""Bazarr: subtitles for what Sonarr and Radarr have."""

from cluster.services.base import Connector, Key
from cluster.services.client import Client


async def health(client: Client) -> str:
    answer = client.expect(await client.get("/api/system/status"), "data")
    return str(client.expect(answer["data"], "bazarr_version")["bazarr_version"])


CONNECTOR = Connector(
    type="bazarr",
    title="Bazarr",
    capabilities=frozenset({"health", "subtitles", "search", "configure"}),
    health=health,
    key=Key(header="X-API-KEY"),
    key_help="Settings, General, Security: API Key.",
)
