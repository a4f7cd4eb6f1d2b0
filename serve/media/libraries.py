"""The routes /api/v1/media: the libraries of a media server, such as Plex."""

from contextlib import AbstractAsyncContextManager
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field

from cluster.services.capabilities.library import Libraries, Library, RecentlyAdded
from cluster.services.http.client import Client
from serve.media.dependencies import ServiceName, connected_service
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/media")


class ScanRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    library_key: str = Field(min_length=1, max_length=100, description="See /api/v1/media/libraries.", examples=["1"])


class ScanStarted(BaseModel):
    success: bool = True
    message: str
    library: str


@router.get("/libraries")
async def list_libraries(caller: CurrentCaller, service: ServiceName = None) -> Libraries:
    async with _library_service(service) as (client, library):
        return await library.libraries(client)


@router.get("/recently-added")
async def list_recently_added(
    caller: CurrentCaller, limit: Annotated[int, Query(ge=1, le=500)] = 20, service: ServiceName = None
) -> RecentlyAdded:
    async with _library_service(service) as (client, library):
        return await library.recently_added(client, limit)


@router.post("/scan")
async def scan_library(body: ScanRequest, caller: AdminCaller, service: ServiceName = None) -> ScanStarted:
    """Start a scan of a library for new files."""
    async with _library_service(service) as (client, library):
        title = await library.scan(client, body.library_key)
    return ScanStarted(message="Library scan triggered", library=title)


def _library_service(service_name: str | None) -> AbstractAsyncContextManager[tuple[Client, Library]]:
    return connected_service(lambda connector: connector.library, "has a media library", service_name)
