"""What the doors to series and movies have in common."""

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
    """Which part of a collection is wanted: all of it, if nothing is said."""

    def __init__(
        self,
        query: Annotated[str | None, Query(max_length=200, description="Only those with this in their title.")] = None,
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
    """A client of the service with this collection; of the one that `word` names."""

    def get_collection(connector: Connector) -> Collection[Any] | None:
        return collection if connector.collection is collection else None

    async with connected_service(get_collection, collection.description, service_name) as (client, _):
        yield client


def publish_added(collection: Collection[Any], item: CollectionItem) -> None:
    """Tell whoever follows what people ask for."""
    data = {
        "request_id": request_id.get(),
        "content_id": str(item.id),
        "title": item.title,
        "type": collection.item_name,
    }
    events.publish([events.build_message(["content_requests"], "content.added", data, now())])
