"""The connector of Bazarr, which downloads subtitles for the media of Sonarr and Radarr."""

from pydantic import BaseModel

from cluster.services.connector import Connector
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.services.tools import LimitArguments
from cluster.tools import Tool


async def health(client: Client) -> str:
    response = client.require_keys(await client.get("/api/system/status"), "data")
    return str(client.require_keys(response["data"], "bazarr_version")["bazarr_version"])


class MissingSubtitles(BaseModel):
    seriesTitle: str | None = None
    episode_number: str | None = None
    episodeTitle: str | None = None
    missing_subtitles: list[dict[str, object]] = []


class MissingSubtitlesPage(BaseModel):
    data: list[MissingSubtitles]
    total: int


async def get_wanted(client: Client, arguments: LimitArguments) -> MissingSubtitlesPage:
    return client.parse(MissingSubtitlesPage, await client.get("/api/episodes/wanted", start=0, length=arguments.limit))


CONNECTOR = Connector(
    type="bazarr",
    title="Bazarr",
    capabilities=frozenset({"health", "subtitles"}),
    health=health,
    key_scheme=ApiKeyScheme(header="X-API-KEY"),
    key_help="Settings, General, Security: API Key.",
    tools=(Tool("get_wanted", "List episodes with missing subtitles", LimitArguments, get_wanted),),
)
