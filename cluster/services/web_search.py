"""The result of a web search, the same for all connectors that search the web."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchResult:
    title: str
    url: str
    content: str | None = None  # an excerpt of the page
