"""What a connector is: all that Forgearr knows of one sort of service.

Each module in `cluster/services/connectors/` declares one, as `CONNECTOR`; that is all it takes to add a service.
Nobody else may branch on the name of a service: what is asked is what it can do.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel

from cluster.services.capabilities.collection import Collection
from cluster.services.capabilities.download_tracking import DownloadTracker
from cluster.services.capabilities.downloads import Downloads
from cluster.services.capabilities.library import Library
from cluster.services.capabilities.settings import SettingsAreas
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.services.web_search import SearchResult

Capability = Literal[
    "health",  # says whether it works, and its version
    "queue",  # downloads that run or wait
    "history",  # downloads that have ended
    "library",  # what there is
    "add",  # takes new things into the library, or new downloads
    "search",  # finds things that could be added, or has them searched for
    "requests",  # people ask for things
    "indexers",  # keeps the places that are searched
    "subtitles",
    "activity",  # who watches what
    "configure",  # its settings can be read and changed
    "models",  # runs language models
    "web_search",
    "vectors",  # keeps vectors, and finds near ones
    "machines",  # runs virtual machines
    "metrics",  # keeps numbers over time
]


@dataclass(frozen=True)
class Tool:
    """Something that a person or a model may have a service do."""

    name: str  # a verb and what it is done to: get_queue
    description: str
    arguments: type[BaseModel]
    run: Callable[[Client, Any], Awaitable[Any]]  # given arguments of that sort
    effect: Literal["read", "change", "destroy"] = "read"


def unchanged(answer: Any) -> Any:
    return answer


@dataclass(frozen=True)
class Connector:
    type: str  # the word for it, as in `type` of /api/services
    title: str  # how it writes its name
    capabilities: frozenset[Capability]
    health: Callable[[Client], Awaitable[str]]  # asks whether it works, with its key; returns its version
    key_scheme: ApiKeyScheme | None = None  # None: it has no keys, or logs in by itself
    aliases: tuple[str, ...] = ()  # other products that are spoken to in the same way
    key_help: str = ""  # where a person finds the key
    unwrap: Callable[[Any], Any] = unchanged  # what an answer holds; raises ErrorInside if that is an error
    tools: tuple[Tool, ...] = ()
    collection: Collection[Any] | None = None  # what it collects: series, movies
    downloads: Downloads | None = None
    library: Library | None = None
    download_tracker: DownloadTracker | None = None
    settings: SettingsAreas | None = None  # how its settings are read and changed
    search_web: Callable[[Client, str], Awaitable[list[SearchResult]]] | None = None  # the pages that suit a question
    session: Callable[[Client, str], AbstractAsyncContextManager[None]] | None = None  # logs in with the key, and out

    @property
    def names(self) -> tuple[str, ...]:
        """Every word that means it."""
        return (self.type, *self.aliases)

    @property
    def takes_key(self) -> bool:
        return self.key_scheme is not None or self.session is not None

    @property
    def needs_key(self) -> bool:
        """Whether nobody is answered without one."""
        return self.takes_key and (self.key_scheme is None or self.key_scheme.required)
