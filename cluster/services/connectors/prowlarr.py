"""The connector of Prowlarr, which manages the indexers of Sonarr and Radarr."""

from pydantic import BaseModel

from cluster.services.arr import connector as arr_connector
from cluster.services.arr.settings import INDEXERS_AREAS
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


class Indexer(BaseModel):
    id: int
    name: str | None = None
    protocol: str | None = None
    privacy: str | None = None
    enable: bool
    priority: int | None = None


async def get_indexers(client: Client, _: Arguments) -> list[Indexer]:
    return client.parse(list[Indexer], await client.get("/api/v1/indexer"))


CONNECTOR = arr_connector.connector(
    "prowlarr",
    "Prowlarr",
    "/api/v1",
    "indexers",
    "configure",
    tools=(Tool("get_indexers", "List the indexers", Arguments, get_indexers),),
    settings=INDEXERS_AREAS,
)
