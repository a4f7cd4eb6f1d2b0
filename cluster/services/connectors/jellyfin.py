"""The connector of Jellyfin, a media server."""

from pydantic import BaseModel

from cluster.services.connector import Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


async def health(client: Client) -> str:
    # /System/Info/Public would be answered without a key.
    system = client.require_keys(await client.get("/System/Info"), "Version")
    if system.get("ProductName") != "Jellyfin Server":
        raise client.wrong_service(system.get("ProductName"))
    return str(system["Version"])


class NowPlaying(BaseModel):
    Name: str | None = None
    SeriesName: str | None = None
    Type: str | None = None


class Session(BaseModel):
    UserName: str | None = None
    Client: str | None = None
    DeviceName: str | None = None
    NowPlayingItem: NowPlaying | None = None


async def get_activity(client: Client, _: Arguments) -> list[Session]:
    sessions = client.parse(list[Session], await client.get("/Sessions"))
    return [session for session in sessions if session.NowPlayingItem]


CONNECTOR = Connector(
    type="jellyfin",
    title="Jellyfin",
    capabilities=frozenset({"health", "activity"}),
    health=health,
    key_scheme=ApiKeyScheme(header="Authorization", template='MediaBrowser Token="{}"'),
    key_help="Dashboard, API Keys.",
    tools=(Tool("get_activity", "List who is watching what now", Arguments, get_activity),),
)
