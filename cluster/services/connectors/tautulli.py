"""Tautulli: who watches what on Plex. Every answer is `{"response": {"result", "message", "data"}}`."""

from typing import Any

from pydantic import BaseModel

from cluster.services.connector import Connector, Tool
from cluster.services.errors import ErrorInside
from cluster.services.http.api_key import Key
from cluster.services.http.client import Client
from cluster.services.tools import Arguments


async def health(client: Client) -> str:
    told = client.expect(await client.get("/api/v2", cmd="get_tautulli_info"), "tautulli_version")
    return str(told["tautulli_version"]).removeprefix("v")


def unwrap(answer: Any) -> Any:
    response = answer.get("response") if isinstance(answer, dict) else None
    if not isinstance(response, dict):
        return answer
    if response.get("result") == "error":
        words = str(response.get("message") or "")
        raise ErrorInside(words, concerns_key="apikey" in words.casefold())
    return response.get("data")


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
    return client.read(Activity, await client.get("/api/v2", cmd="get_activity")).sessions


CONNECTOR = Connector(
    type="tautulli",
    title="Tautulli",
    capabilities=frozenset({"health", "activity"}),
    health=health,
    key=Key(parameter="apikey"),
    key_help="Settings, Web Interface: API key.",
    unwrap=unwrap,
    tools=(Tool("get_activity", "List who watches what right now", Arguments, get_activity),),
)
