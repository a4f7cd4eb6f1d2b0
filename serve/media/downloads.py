"""The routes /api/v1/downloads: the queue and the history of a download client, such as SABnzbd."""

from contextlib import AbstractAsyncContextManager
from typing import Annotated

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel

from cluster.services.capabilities.downloads import DownloadHistory, DownloadQueue, Downloads, QueuePauseState
from cluster.services.http.client import Client
from serve.media.dependencies import ServiceName, connected_service
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/v1/downloads")

DownloadId = Annotated[str, Path(examples=["SABnzbd_nzo_abc123"])]


class DownloadRetried(BaseModel):
    success: bool = True
    message: str
    nzo_id: str
    new_nzo_id: str


class DownloadDeleted(BaseModel):
    success: bool = True
    message: str
    nzo_id: str


@router.get("/queue")
async def show_queue(caller: CurrentCaller, service: ServiceName = None) -> DownloadQueue:
    """Get the queue: running and waiting downloads."""
    async with _download_service(service) as (client, downloads):
        return await downloads.queue(client)


@router.get("/history")
async def show_history(
    caller: CurrentCaller, limit: Annotated[int, Query(ge=1, le=1000)] = 50, service: ServiceName = None
) -> DownloadHistory:
    """Get the finished and failed downloads, the newest first."""
    async with _download_service(service) as (client, downloads):
        return await downloads.history(client, limit)


@router.post("/retry/{nzo_id}")
async def retry_download(nzo_id: DownloadId, caller: CurrentCaller, service: ServiceName = None) -> DownloadRetried:
    """Retry a failed download."""
    async with _download_service(service) as (client, downloads):
        new_id = await downloads.retry(client, nzo_id)
    return DownloadRetried(message="Download retried successfully", nzo_id=nzo_id, new_nzo_id=new_id)


@router.post("/pause")
async def pause_queue(caller: AdminCaller, service: ServiceName = None) -> QueuePauseState:
    """Pause the queue: running downloads stop, and no new ones start."""
    async with _download_service(service) as (client, downloads):
        return await downloads.pause(client)


@router.post("/resume")
async def resume_queue(caller: AdminCaller, service: ServiceName = None) -> QueuePauseState:
    """Resume the queue."""
    async with _download_service(service) as (client, downloads):
        return await downloads.resume(client)


@router.delete("/{nzo_id}")
async def delete_download(
    nzo_id: DownloadId,
    caller: AdminCaller,
    delete_files: Annotated[bool, Query(description="Delete its downloaded files, too.")] = True,
    service: ServiceName = None,
) -> DownloadDeleted:
    """Remove a download from the queue."""
    async with _download_service(service) as (client, downloads):
        await downloads.delete(client, nzo_id, delete_files)
    return DownloadDeleted(message="Download deleted successfully", nzo_id=nzo_id)


def _download_service(service_name: str | None) -> AbstractAsyncContextManager[tuple[Client, Downloads]]:
    return connected_service(lambda connector: connector.downloads, "downloads", service_name)
