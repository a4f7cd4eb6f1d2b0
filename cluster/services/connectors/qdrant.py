"""The connector of Qdrant, a vector database."""

from pydantic import BaseModel

from cluster.services.connector import Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


async def health(client: Client) -> str:
    root_info = client.require_keys(await client.get("/"), "title", "version")
    if not str(root_info["title"]).startswith("qdrant"):
        raise client.wrong_service(root_info["title"])
    await client.get("/collections")  # the first call is answered without a key
    return str(root_info["version"])


class Collection(BaseModel):
    name: str


class Collections(BaseModel):
    collections: list[Collection]


class CollectionsResponse(BaseModel):
    result: Collections


async def get_collections(client: Client, _: Arguments) -> list[Collection]:
    return client.parse(CollectionsResponse, await client.get("/collections")).result.collections


CONNECTOR = Connector(
    type="qdrant",
    title="Qdrant",
    capabilities=frozenset({"health", "vectors"}),
    health=health,
    key_scheme=ApiKeyScheme(header="api-key", required=False),
    key_help="service.api_key of its configuration.",
    tools=(Tool("get_collections", "List the collections of vectors", Arguments, get_collections),),
)
