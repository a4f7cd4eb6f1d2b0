"""Prometheus: numbers over time. Every answer is `{"status", "data"}`."""

from typing import Any

from cluster.services.base import Connector, Key
from cluster.services.client import Client
from cluster.services.errors import ErrorInside


async def health(client: Client) -> str:
    build = client.expect(await client.get("/api/v1/status/buildinfo"), "version", "goVersion")
    return str(build["version"])


def unwrap(answer: Any) -> Any:
    if isinstance(answer, dict) and answer.get("status") == "error":
        raise ErrorInside(str(answer.get("error") or ""))
    return answer["data"] if isinstance(answer, dict) and "data" in answer else answer


CONNECTOR = Connector(
    type="prometheus",
    title="Prometheus",
    capabilities=frozenset({"health", "metrics"}),
    health=health,
    key=Key(header="Authorization", form="Bearer {}", needed=False),
    key_help="Only behind a proxy that wants one.",
    unwrap=unwrap,
)
