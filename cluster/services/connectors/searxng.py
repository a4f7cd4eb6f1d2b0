"""SearXNG: searches the web. Its settings must allow the format json."""

from pydantic import BaseModel, Field

from cluster.services.connector import Connector, Tool
from cluster.services.http.client import Client
from cluster.services.tools import Arguments
from cluster.services.web_search import Source

URL_MAX = 1000
TITLE_MAX = 300


class Result(BaseModel):
    title: str = ""
    url: str
    content: str | None = None


class Results(BaseModel):
    results: list[Result]


class Question(Arguments):
    query: str = Field(min_length=1, max_length=500, description="What to search for")
    limit: int = Field(default=10, ge=1, le=50, description="Maximum results to return")


async def health(client: Client) -> str:
    config = client.expect(await client.get("/config"), "engines", "categories", "version")
    return str(config["version"])


async def search_web(client: Client, question: str) -> list[Source]:
    answer = client.read(Results, await client.get("/search", q=question, format="json"))
    return [
        Source(" ".join(result.title.split())[:TITLE_MAX], result.url, result.content)
        for result in answer.results
        if result.url.startswith(("https://", "http://")) and result.url.isprintable() and len(result.url) <= URL_MAX
    ]


async def find_pages(client: Client, wanted: Question) -> list[Source]:
    return (await search_web(client, wanted.query))[: wanted.limit]


CONNECTOR = Connector(
    type="searxng",
    title="SearXNG",
    aliases=("searx",),
    capabilities=frozenset({"health", "web_search"}),
    health=health,
    tools=(Tool("search_web", "Search the web", Question, find_pages),),
    search_web=search_web,
)
