"""What the routes of series and of movies share: parameters, the service's client and the live message."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, Path, Query
from pydantic import BaseModel, Field

from cluster import events
from cluster.db import now
from cluster.logs import request_id
from cluster.services.capabilities.collection import MAX_ID, Collection, CollectionItem
from cluster.services.connector import Connector
from cluster.services.http.client import Client
from serve.media.dependencies import connected_service

CollectionItemId = Annotated[int, Path(ge=1, le=MAX_ID)]
DeleteFiles = Annotated[bool, Query(description="Delete the media files too.")]


class CollectionQuery:
    """The query parameters of a list. The default is the whole collection."""

    def __init__(
        self,
        query: Annotated[
            str | None, Query(max_length=200, description="Only items with this text in the title.")
        ] = None,
        offset: Annotated[int, Query(ge=0, le=MAX_ID)] = 0,
        limit: Annotated[int | None, Query(ge=1, le=MAX_ID)] = None,
    ) -> None:
        self.query = query
        self.offset = offset
        self.limit = limit


CollectionParams = Annotated[CollectionQuery, Depends()]


class SearchStarted(BaseModel):
    success: bool = True
    message: str
    command_id: str = Field(examples=["cmd_789"])


@asynccontextmanager
async def collection_client(collection: Collection[Any], service_name: str | None) -> AsyncGenerator[Client]:
    """A client of the service that has this collection. `service_name` selects one if there are more."""

    def get_collection(connector: Connector) -> Collection[Any] | None:
        return collection if connector.collection is collection else None

    async with connected_service(get_collection, collection.description, service_name) as (client, _):
        yield client


def publish_added(collection: Collection[Any], item: CollectionItem) -> None:
    """Send a live message about an added item."""
    data = {
        "request_id": request_id.get(),
        "content_id": str(item.id),
        "title": item.title,
        "type": collection.item_name,
    }
    events.publish([events.build_message(["content_requests"], "content.added", data, now())])
