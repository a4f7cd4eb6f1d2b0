"""SABnzbd: downloads from Usenet. Every call is `/api?mode=…`, and an error may come with status 200."""

from typing import Any

from cluster.services.base import Connector, Key
from cluster.services.client import Client
from cluster.services.errors import ErrorInside
from cluster.services.sabnzbd_downloads import DOWNLOADS


async def health(client: Client) -> str:
    # `mode=version` would be answered without a key.
    answer = client.expect(await client.get("/api", mode="queue", output="json", limit=1), "queue")
    return str(client.expect(answer["queue"], "version")["version"])


def unwrap(answer: Any) -> Any:
    if isinstance(answer, dict) and answer.get("status") is False and "error" in answer:
        words = str(answer["error"])
        raise ErrorInside(words, concerns_key="api key" in words.casefold())
    return answer


CONNECTOR = Connector(
    type="sabnzbd",
    title="SABnzbd",
    capabilities=frozenset({"health", "queue", "history", "add", "configure"}),
    health=health,
    key=Key(parameter="apikey"),
    key_help="Config, General, Security: API Key.",
    unwrap=unwrap,
    downloads=DOWNLOADS,
)
