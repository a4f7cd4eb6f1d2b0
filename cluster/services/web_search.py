"""A page that a web search has found."""

from dataclasses import dataclass


@dataclass(frozen=True)
class SearchResult:
    """A page that a web search has found."""

    title: str
    url: str
    content: str | None = None  # what is said there, in a few words
