"""Overseerr, and its successors Jellyseerr and Seerr: people ask for movies and series."""

from cluster.services.base import Connector, Key
from cluster.services.client import Client


async def health(client: Client) -> str:
    # /status would be answered without a key.
    about = client.expect(await client.get("/api/v1/settings/about"), "version", "totalRequests")
    return str(about["version"])


CONNECTOR = Connector(
    type="overseerr",
    title="Overseerr",
    aliases=("jellyseerr", "seerr"),
    capabilities=frozenset({"health", "requests", "search"}),
    health=health,
    key=Key(header="X-Api-Key"),
    key_help="Settings, General: API Key.",
)
