"""Qdrant: vectors."""

from pydantic import BaseModel

from cluster.services.connector import Connector, Tool
from cluster.services.http.api_key import Key
from cluster.services.http.client import Client
from cluster.services.tools import Arguments


async def health(client: Client) -> str:
    told = client.expect(await client.get("/"), "title", "version")
    if not str(told["title"]).startswith("qdrant"):
        raise client.wrong(told["title"])
    await client.get("/collections")  # the first call is answered without a key
    return str(told["version"])


class Collection(BaseModel):
    name: str


class Collections(BaseModel):
    collections: list[Collection]


class CollectionsAnswer(BaseModel):
    result: Collections


async def get_collections(client: Client, _: Arguments) -> list[Collection]:
    return client.read(CollectionsAnswer, await client.get("/collections")).result.collections


CONNECTOR = Connector(
    type="qdrant",
    title="Qdrant",
    capabilities=frozenset({"health", "vectors"}),
    health=health,
    key=Key(header="api-key", needed=False),
    key_help="service.api_key of its configuration.",
    tools=(Tool("get_collections", "List the collections of vectors", Arguments, get_collections),),
)
