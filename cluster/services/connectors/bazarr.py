"""Bazarr: subtitles for what Sonarr and Radarr have."""

from pydantic import BaseModel

from cluster.services.connector import Connector, Tool
from cluster.services.http.api_key import Key
from cluster.services.http.client import Client
from cluster.services.tools import HowMany


async def health(client: Client) -> str:
    answer = client.expect(await client.get("/api/system/status"), "data")
    return str(client.expect(answer["data"], "bazarr_version")["bazarr_version"])


class Wanted(BaseModel):
    seriesTitle: str | None = None
    episode_number: str | None = None
    episodeTitle: str | None = None
    missing_subtitles: list[dict[str, object]] = []


class AllWanted(BaseModel):
    data: list[Wanted]
    total: int


async def get_wanted(client: Client, wanted: HowMany) -> AllWanted:
    return client.read(AllWanted, await client.get("/api/episodes/wanted", start=0, length=wanted.limit))


CONNECTOR = Connector(
    type="bazarr",
    title="Bazarr",
    capabilities=frozenset({"health", "subtitles"}),
    health=health,
    key=Key(header="X-API-KEY"),
    key_help="Settings, General, Security: API Key.",
    tools=(Tool("get_wanted", "List episodes whose subtitles are missing", HowMany, get_wanted),),
)
