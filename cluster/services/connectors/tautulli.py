"""The connector of Tautulli, which monitors Plex. Every response is `{"response": {"result", "message", "data"}}`."""

from typing import Any

from pydantic import BaseModel

from cluster.services.connector import Connector
from cluster.services.errors import ErrorInResponse
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


async def health(client: Client) -> str:
    tautulli_info = client.require_keys(await client.get("/api/v2", cmd="get_tautulli_info"), "tautulli_version")
    return str(tautulli_info["tautulli_version"]).removeprefix("v")


def unwrap(response: Any) -> Any:
    result = response.get("response") if isinstance(response, dict) else None
    if not isinstance(result, dict):
        return response
    if result.get("result") == "error":
        message = str(result.get("message") or "")
        raise ErrorInResponse(message, is_key_error="apikey" in message.casefold())
    return result.get("data")


class Stream(BaseModel):
    user: str | None = None
    full_title: str
    media_type: str | None = None
    state: str | None = None
    progress_percent: str | int | None = None
    player: str | None = None
    transcode_decision: str | None = None


class Activity(BaseModel):
    sessions: list[Stream]


async def get_activity(client: Client, _: Arguments) -> list[Stream]:
    return client.parse(Activity, await client.get("/api/v2", cmd="get_activity")).sessions


CONNECTOR = Connector(
    type="tautulli",
    title="Tautulli",
    capabilities=frozenset({"health", "activity"}),
    health=health,
    key_scheme=ApiKeyScheme(query_parameter="apikey"),
    key_help="Settings, Web Interface: API key.",
    unwrap=unwrap,
    tools=(Tool("get_activity", "List who is watching what now", Arguments, get_activity),),
)
