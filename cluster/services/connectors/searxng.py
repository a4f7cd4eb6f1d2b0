"""The connector of SearXNG, which searches the web. Its settings must allow the format json."""

from pydantic import BaseModel, Field

from cluster.services.connector import Connector
from cluster.services.http.client import Client
from cluster.services.web_search import SearchResult
from cluster.tools import Arguments, Tool

MAX_URL_LENGTH = 1000
MAX_TITLE_LENGTH = 300


class Result(BaseModel):
    title: str = ""
    url: str
    content: str | None = None


class Results(BaseModel):
    results: list[Result]


class SearchArguments(Arguments):
    query: str = Field(min_length=1, max_length=500, description="What to search for")
    limit: int = Field(default=10, ge=1, le=50, description="Maximum results to return")


async def health(client: Client) -> str:
    config = client.require_keys(await client.get("/config"), "engines", "categories", "version")
    return str(config["version"])


async def search_web(client: Client, query: str) -> list[SearchResult]:
    response = client.parse(Results, await client.get("/search", q=query, format="json"))
    return [
        SearchResult(" ".join(result.title.split())[:MAX_TITLE_LENGTH], result.url, result.content)
        for result in response.results
        if result.url.startswith(("https://", "http://"))
        and result.url.isprintable()
        and len(result.url) <= MAX_URL_LENGTH
    ]


async def find_pages(client: Client, arguments: SearchArguments) -> list[SearchResult]:
    return (await search_web(client, arguments.query))[: arguments.limit]


CONNECTOR = Connector(
    type="searxng",
    title="SearXNG",
    aliases=("searx",),
    capabilities=frozenset({"health", "web_search"}),
    health=health,
    tools=(Tool("search_web", "Search the web", SearchArguments, find_pages),),
    search_web=search_web,
)
