"""SearXNG: searches the web. Its settings must allow the format json."""

from cluster.services.base import Connector
from cluster.services.client import Client


async def health(client: Client) -> str:
    config = client.expect(await client.get("/config"), "engines", "categories", "version")
    return str(config["version"])


CONNECTOR = Connector(
    type="searxng",
    title="SearXNG",
    aliases=("searx",),
    capabilities=frozenset({"health", "web_search"}),
    health=health,
)
