"""What a connector is: all that Forgearr knows of one sort of service.

Each module in `cluster/services/connectors/` declares one, as `CONNECTOR`; that is all it takes to add a service.
Nobody else may branch on the name of a service: what is asked is what it can do.
"""

from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel

from cluster.services.downloads import Downloads
from cluster.services.following import Following
from cluster.services.libraries import Library

if TYPE_CHECKING:
    from cluster.services.areas import Areas
    from cluster.services.client import Client
    from cluster.services.collections import Collection

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
class Key:
    """How an API key travels: in a header, or in the query of the address."""

    header: str | None = None
    parameter: str | None = None
    form: str = "{}"  # what stands in the header, with the key in it
    needed: bool = True  # whether the service answers nobody without one

    def headers(self, key: str | None) -> dict[str, str]:
        return {self.header: self.form.format(key)} if self.header and key else {}

    def parameters(self, key: str | None) -> dict[str, str]:
        return {self.parameter: key} if self.parameter and key else {}


@dataclass(frozen=True)
class Tool:
    """Something that a person or a model may have a service do."""

    name: str  # a verb and what it is done to: get_queue
    description: str
    arguments: type[BaseModel]
    run: Callable[["Client", Any], Awaitable[Any]]  # given arguments of that sort
    effect: Literal["read", "change", "destroy"] = "read"


@dataclass(frozen=True)
class Source:
    """A page that a web search has found."""

    title: str
    url: str
    content: str | None = None  # what is said there, in a few words


def as_it_is(answer: Any) -> Any:
    return answer


@dataclass(frozen=True)
class Connector:
    type: str  # the word for it, as in `type` of /api/services
    title: str  # how it writes its name
    capabilities: frozenset[Capability]
    health: Callable[["Client"], Awaitable[str]]  # asks whether it works, with its key; returns its version
    key: Key | None = None  # None: it has no keys, or logs in by itself
    aliases: tuple[str, ...] = ()  # other products that are spoken to in the same way
    key_help: str = ""  # where a person finds the key
    unwrap: Callable[[Any], Any] = as_it_is  # what an answer holds; raises ErrorInside if that is an error
    tools: tuple[Tool, ...] = ()
    collection: "Collection[Any] | None" = None  # what it collects: series, movies
    downloads: Downloads | None = None
    library: Library | None = None
    following: Following | None = None
    settings: "Areas | None" = None  # how its settings are read and changed
    search_web: "Callable[[Client, str], Awaitable[list[Source]]] | None" = None  # the pages that suit a question
    session: Callable[["Client", str], AbstractAsyncContextManager[None]] | None = None  # logs in with the key, and out

    @property
    def names(self) -> tuple[str, ...]:
        """Every word that means it."""
        return (self.type, *self.aliases)

    @property
    def takes_key(self) -> bool:
        return self.key is not None or self.session is not None

    @property
    def needs_key(self) -> bool:
        """Whether nobody is answered without one."""
        return self.takes_key and (self.key is None or self.key.needed)
