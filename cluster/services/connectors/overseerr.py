"""Overseerr, and its successors Jellyseerr and Seerr: people ask for movies and series."""

from pydantic import BaseModel

from cluster.services.connector import Connector, Tool
from cluster.services.http.api_key import Key
from cluster.services.http.client import Client
from cluster.services.tools import HowMany


async def health(client: Client) -> str:
    # /status would be answered without a key.
    about = client.expect(await client.get("/api/v1/settings/about"), "version", "totalRequests")
    return str(about["version"])


class Requested(BaseModel):
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
    media: Requested | None = None
    requestedBy: Person | None = None


class Requests(BaseModel):
    results: list[Request]


async def get_requests(client: Client, wanted: HowMany) -> list[Request]:
    answer = await client.get("/api/v1/request", take=wanted.limit, skip=0, sort="added")
    return client.read(Requests, answer).results


CONNECTOR = Connector(
    type="overseerr",
    title="Overseerr",
    aliases=("jellyseerr", "seerr"),
    capabilities=frozenset({"health", "requests"}),
    health=health,
    key=Key(header="X-Api-Key"),
    key_help="Settings, General: API Key.",
    tools=(Tool("get_requests", "List what people have asked for, the latest first", HowMany, get_requests),),
)
