"""Jellyfin: the library that people watch."""

from cluster.services.base import Connector, Key
from cluster.services.client import Client


async def health(client: Client) -> str:
    # /System/Info/Public would be answered without a key.
    system = client.expect(await client.get("/System/Info"), "Version")
    if system.get("ProductName") != "Jellyfin Server":
        raise client.wrong(system.get("ProductName"))
    return str(system["Version"])


CONNECTOR = Connector(
    type="jellyfin",
    title="Jellyfin",
    capabilities=frozenset({"health", "library", "search", "activity", "configure"}),
    health=health,
    key=Key(header="Authorization", form='MediaBrowser Token="{}"'),
    key_help="Dashboard, API Keys.",
)
