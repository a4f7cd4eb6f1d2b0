"""The connector of Qdrant, a vector database."""

import asyncio
from urllib.parse import quote

from pydantic import BaseModel

from cluster.services.capabilities.server_values import MB, ServerValues, VectorDatabase, in_units, sum_known
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


class CollectionInfo(BaseModel):
    points_count: int | None = None


class CollectionResponse(BaseModel):
    result: CollectionInfo


class MemoryTelemetry(BaseModel):
    resident_bytes: int | None = None


class Telemetry(BaseModel):
    memory: MemoryTelemetry | None = None


class TelemetryResponse(BaseModel):
    result: Telemetry


async def server_values(client: Client) -> ServerValues:
    """Its API does not tell how much of the disk its collections take."""
    version = await health(client)
    collections = await get_collections(client, Arguments())
    counts = await asyncio.gather(*(_count_points(client, collection.name) for collection in collections))
    memory = client.parse(TelemetryResponse, await client.get("/telemetry", details_level=1)).result.memory
    return ServerValues(
        qdrant=VectorDatabase(
            status="running",
            collections=len(collections),
            total_points=sum_known(counts),
            disk_usage_gb=None,
            memory_usage_mb=in_units(memory and memory.resident_bytes, MB),
            version=version,
        )
    )


async def _count_points(client: Client, collection: str) -> int | None:
    response = await client.get(f"/collections/{quote(collection, safe='')}")
    return client.parse(CollectionResponse, response).result.points_count


CONNECTOR = Connector(
    type="qdrant",
    title="Qdrant",
    capabilities=frozenset({"health", "vectors"}),
    health=health,
    key_scheme=ApiKeyScheme(header="api-key", required=False),
    key_help="service.api_key of its configuration.",
    server_values=server_values,
    tools=(Tool("get_collections", "List the collections of vectors", Arguments, get_collections),),
)
