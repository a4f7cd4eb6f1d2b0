"""Ollama: language models on another machine."""

from cluster.services.base import Connector, Key
from cluster.services.client import Client


async def health(client: Client) -> str:
    told = client.expect(await client.get("/api/version"), "version")
    client.expect(await client.get("/api/tags"), "models")  # others have a version too
    return str(told["version"])


CONNECTOR = Connector(
    type="ollama",
    title="Ollama",
    capabilities=frozenset({"health", "models"}),
    health=health,
    key=Key(header="Authorization", form="Bearer {}", needed=False),
    key_help="Only behind a proxy that wants one.",
)
