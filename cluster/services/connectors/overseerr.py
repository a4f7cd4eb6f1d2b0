"""The connector of Overseerr and its successors Jellyseerr and Seerr, where people request movies and series."""

from pydantic import BaseModel

from cluster.services.connector import Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.services.tools import LimitArguments
from cluster.tools import Tool


async def health(client: Client) -> str:
    # /status would be answered without a key.
    about = client.require_keys(await client.get("/api/v1/settings/about"), "version", "totalRequests")
    return str(about["version"])


class RequestedMedia(BaseModel):
    tmdbId: int | None = None
    tvdbId: int | None = None
    status: int | None = None


class Person(BaseModel):
    displayName: str | None = None


class Request(BaseModel):
    id: int
    type: str | None = None
    status: int
    createdAt: str | None = None
    media: RequestedMedia | None = None
    requestedBy: Person | None = None


class Requests(BaseModel):
    results: list[Request]


async def get_requests(client: Client, arguments: LimitArguments) -> list[Request]:
    response = await client.get("/api/v1/request", take=arguments.limit, skip=0, sort="added")
    return client.parse(Requests, response).results


CONNECTOR = Connector(
    type="overseerr",
    title="Overseerr",
    aliases=("jellyseerr", "seerr"),
    capabilities=frozenset({"health", "requests"}),
    health=health,
    key_scheme=ApiKeyScheme(header="X-Api-Key"),
    key_help="Settings, General: API Key.",
    tools=(Tool("get_requests", "List people's requests, newest first", LimitArguments, get_requests),),
)
