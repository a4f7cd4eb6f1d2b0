"""What the doors to series and movies have in common."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, Path, Query
from pydantic import BaseModel, Field

from cluster import events
from cluster.db import now
from cluster.logs import request_id
from cluster.services.capabilities.collection import ID_MAX, Collection, Thing
from cluster.services.connector import Connector
from cluster.services.http.client import Client
from serve.media.dependencies import connected

ThingId = Annotated[int, Path(ge=1, le=ID_MAX)]
DeleteFiles = Annotated[bool, Query(description="Delete the media files too.")]


class Part:
    """Which part of a collection is wanted: all of it, if nothing is said."""

    def __init__(
        self,
        query: Annotated[str | None, Query(max_length=200, description="Only those with this in their title.")] = None,
        offset: Annotated[int, Query(ge=0, le=ID_MAX)] = 0,
        limit: Annotated[int | None, Query(ge=1, le=ID_MAX)] = None,
    ) -> None:
        self.query = query
        self.offset = offset
        self.limit = limit


WantedPart = Annotated[Part, Depends()]


class SearchBegun(BaseModel):
    success: bool = True
    message: str
    command_id: str = Field(examples=["cmd_789"])


@asynccontextmanager
async def collector(collection: Collection[Any], word: str | None) -> AsyncGenerator[Client]:
    """A client of the service with this collection; of the one that `word` names."""

    def part(connector: Connector) -> Collection[Any] | None:
        return collection if connector.collection is collection else None

    async with connected(part, collection.does, word) as (client, _):
        yield client


def tell_added(collection: Collection[Any], thing: Thing) -> None:
    """Tell whoever follows what people ask for."""
    data = {
        "request_id": request_id.get(),
        "content_id": str(thing.id),
        "title": thing.title,
        "type": collection.word,
    }
    events.publish([events.message(["content_requests"], "content.added", data, now())])
