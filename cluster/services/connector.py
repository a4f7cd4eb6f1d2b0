"""The class `Connector`: everything that Forgearr knows about one type of service.

Each module in `cluster/services/connectors/` declares one as `CONNECTOR`; a new type of service needs nothing else. No
other code may branch on the type of a service: it checks for capabilities.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal

from cluster.services.capabilities.collection import Collection
from cluster.services.capabilities.download_tracking import DownloadTracker
from cluster.services.capabilities.downloads import Downloads
from cluster.services.capabilities.library import Library
from cluster.services.capabilities.server_values import ServerValues
from cluster.services.capabilities.settings import SettingsAreas
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.services.web_search import SearchResult
from cluster.tools import Tool

Capability = Literal[
    "health",  # reports whether it works, and its version
    "queue",  # has active downloads
    "history",  # has finished downloads
    "library",  # has a library of media
    "add",  # adds items to its library, or downloads
    "search",  # finds items that can be added, or searches for their releases
    "requests",  # takes people's requests for media
    "indexers",  # manages the indexers that are searched
    "subtitles",
    "activity",  # knows who is watching what
    "configure",  # its settings can be read and written
    "models",  # runs language models
    "web_search",
    "vectors",  # stores vectors, and finds similar ones
    "machines",  # runs virtual machines
    "metrics",  # stores time series
]


def unchanged(content: Any) -> Any:
    return content


@dataclass(frozen=True)
class Connector:
    type: str  # its identifier, as in `type` of /api/services
    title: str  # its name, as its makers write it
    capabilities: frozenset[Capability]
    health: Callable[[Client], Awaitable[str]]  # checks that it works, with its key; returns its version
    key_scheme: ApiKeyScheme | None = None  # None: it has no keys, or `session` logs in with the key
    aliases: tuple[str, ...] = ()  # types of other products with the same API
    key_help: str = ""  # where a person finds the key
    unwrap: Callable[[Any], Any] = unchanged  # takes the content out of a response; may raise ErrorInResponse
    tools: tuple[Tool[Client], ...] = ()
    collection: Collection[Any] | None = None  # what it collects: series, movies
    downloads: Downloads | None = None
    library: Library | None = None
    download_tracker: DownloadTracker | None = None
    settings: SettingsAreas | None = None  # how its settings are read and written
    search_web: Callable[[Client, str], Awaitable[list[SearchResult]]] | None = None  # finds pages for a query
    server_values: Callable[[Client], Awaitable[ServerValues]] | None = None  # what it knows of a server
    session: Callable[[Client, str], AbstractAsyncContextManager[None]] | None = None  # logs in with the key, and out

    @property
    def names(self) -> tuple[str, ...]:
        """Its type and its aliases."""
        return (self.type, *self.aliases)

    @property
    def takes_key(self) -> bool:
        return self.key_scheme is not None or self.session is not None

    @property
    def needs_key(self) -> bool:
        """Whether the service answers no request without a key."""
        return self.takes_key and (self.key_scheme is None or self.key_scheme.required)
