"""Qdrant: vectors."""

from cluster.services.base import Connector, Key
from cluster.services.client import Client


async def health(client: Client) -> str:
    told = client.expect(await client.get("/"), "title", "version")
    if not str(told["title"]).startswith("qdrant"):
        raise client.wrong(told["title"])
    await client.get("/collections")  # the first call is answered without a key
    return str(told["version"])


CONNECTOR = Connector(
    type="qdrant",
    title="Qdrant",
    capabilities=frozenset({"health", "vectors"}),
    health=health,
    key=Key(header="api-key", needed=False),
    key_help="service.api_key of its configuration.",
)
