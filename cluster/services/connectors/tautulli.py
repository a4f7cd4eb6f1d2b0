"""Tautulli: who watches what on Plex. Every answer is `{"response": {"result", "message", "data"}}`."""

from typing import Any

from cluster.services.base import Connector, Key
from cluster.services.client import Client
from cluster.services.errors import ErrorInside


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


CONNECTOR = Connector(
    type="tautulli",
    title="Tautulli",
    capabilities=frozenset({"health", "activity", "history"}),
    health=health,
    key=Key(parameter="apikey"),
    key_help="Settings, Web Interface: API key.",
    unwrap=unwrap,
)
