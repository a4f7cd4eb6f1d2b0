"""The connector of qBittorrent. Its key is an API key (since version 5.2), or NAME:PASSWORD of a login."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from pydantic import BaseModel, Field

from cluster.services.connector import Connector
from cluster.services.errors import ServiceError
from cluster.services.http.client import Client
from cluster.services.tools import LimitArguments
from cluster.tools import Tool

KEY_PREFIX = "qbt_"


async def health(client: Client) -> str:
    client.require_keys(await client.get("/api/v2/app/buildInfo"), "libtorrent")
    return (await client.get_text("/api/v2/app/version")).removeprefix("v")


@asynccontextmanager
async def session(client: Client, key: str) -> AsyncGenerator[None]:
    if key.startswith(KEY_PREFIX):
        if not (key.isascii() and key.isprintable()):
            raise client.unauthorized()
        client.set_headers({"Authorization": f"Bearer {key}"})
        yield
        return
    username, _, password = key.partition(":")
    login_result = await client.post_form("/api/v2/auth/login", {"username": username, "password": password})
    if login_result == "Fails.":
        raise client.unauthorized()
    try:
        yield
    finally:
        with suppress(ServiceError):  # without a logout, the session stays open for an hour
            await client.post_form("/api/v2/auth/logout", {})


class Torrent(BaseModel):
    hash: str
    name: str
    state: str
    progress: float = Field(description="From 0 to 1.")
    size: int
    dlspeed: int = Field(description="Bytes per second.")
    eta: int | None = Field(default=None, description="Seconds.")
    category: str | None = None


async def get_torrents(client: Client, arguments: LimitArguments) -> list[Torrent]:
    return client.parse(list[Torrent], await client.get("/api/v2/torrents/info", limit=arguments.limit))


CONNECTOR = Connector(
    type="qbittorrent",
    title="qBittorrent",
    capabilities=frozenset({"health", "queue"}),
    health=health,
    session=session,
    key_help="Options, WebUI: an API key, or NAME:PASSWORD.",
    tools=(Tool("get_torrents", "List the torrents, with state and progress", LimitArguments, get_torrents),),
)
