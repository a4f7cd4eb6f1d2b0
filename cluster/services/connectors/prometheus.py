"""The connector of Prometheus, which stores metrics. Every response is `{"status", "data"}`."""

from typing import Any

from pydantic import BaseModel, Field

from cluster.services.connector import Connector
from cluster.services.errors import ErrorInResponse
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


async def health(client: Client) -> str:
    build = client.require_keys(await client.get("/api/v1/status/buildinfo"), "version", "goVersion")
    return str(build["version"])


def unwrap(response: Any) -> Any:
    if isinstance(response, dict) and response.get("status") == "error":
        raise ErrorInResponse(str(response.get("error") or ""))
    return response["data"] if isinstance(response, dict) and "data" in response else response


class QueryArguments(Arguments):
    query: str = Field(min_length=1, max_length=5000, description="An expression of PromQL")


class QueryResult(BaseModel):
    resultType: str
    result: list[Any]


async def query_metrics(client: Client, arguments: QueryArguments) -> QueryResult:
    return client.parse(QueryResult, await client.get("/api/v1/query", query=arguments.query))


CONNECTOR = Connector(
    type="prometheus",
    title="Prometheus",
    capabilities=frozenset({"health", "metrics"}),
    health=health,
    key_scheme=ApiKeyScheme(header="Authorization", template="Bearer {}", required=False),
    key_help="Only behind a proxy that requires one.",
    unwrap=unwrap,
    tools=(Tool("query_metrics", "Get the current value of an expression", QueryArguments, query_metrics),),
)
