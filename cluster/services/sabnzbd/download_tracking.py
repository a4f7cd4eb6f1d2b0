"""Track downloads in SABnzbd: poll its queue, and the new part of its history."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from cluster.services.capabilities.download_tracking import (
    MAX_ID_LENGTH,
    ActiveDownload,
    ActiveState,
    DownloadSnapshot,
    DownloadTracker,
    FinishedDownload,
    FinishedFolders,
    TrackingPosition,
    to_single_line,
)
from cluster.services.http.client import Client
from cluster.services.sabnzbd.downloads import Text, call_api, retry

PAGE_SIZE = 200
MAX_PAGES = 50
MAX_TIMESTAMP = 253_402_300_799
"""The last second of the year 9999, the last one that a datetime can have."""
OVERLAP = timedelta(hours=1)
"""This part of the history is read again, because it is in the order of a clock that may have been set back."""
FULL_READ_INTERVAL = timedelta(minutes=15)
"""SABnzbd counts the changes of its history from 1 again when it starts, so "no change" is trusted only for so long."""
MEBIBYTE = 1024 * 1024
BUSY_STATUSES = {"Checking", "Grabbing", "Fetching"}
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_LENGTH)]
STATE_BY_STATUS: dict[str, ActiveState] = {**dict.fromkeys(BUSY_STATUSES, "processing"), "Downloading": "running"}


class QueueSlot(BaseModel):
    nzo_id: Id
    filename: Text = ""
    status: str | None = None
    cat: str | None = None
    mb_left: float | None = Field(default=None, alias="mbleft", ge=0, le=1e12)


class Queue(BaseModel):
    slots: list[QueueSlot]
    status: str | None = None
    speed: float = Field(alias="kbpersec")


class QueueResponse(BaseModel):
    queue: Queue


class HistorySlot(BaseModel):
    nzo_id: Id
    name: Text = ""
    status: str | None = None
    category: str | None = None
    fail_message: Text = ""
    completed: int | None = Field(default=None, ge=0, le=MAX_TIMESTAMP)
    storage: str | None = None
    loaded: bool = False


class History(BaseModel):
    slots: list[HistorySlot]
    changes: int | None = Field(default=None, alias="last_history_update")


class HistoryResponse(BaseModel):
    history: History | Literal[False]


class FullStatus(BaseModel):
    completedir: str = Field(min_length=1)


class StatusResponse(BaseModel):
    status: FullStatus


class Category(BaseModel):
    dir: str | None = None


class CategoryList(BaseModel):
    categories: list[Category] = []  # SABnzbd omits an empty list


class CategoryResponse(BaseModel):
    config: CategoryList


@dataclass(frozen=True)
class HistoryRead:
    """The rows that were read of the history, and SABnzbd's count of its changes."""

    slots: list[HistorySlot]
    changes: int | None


async def poll(client: Client, position: TrackingPosition) -> DownloadSnapshot:
    slots, speed, paused = await _queue(client)
    read_from, changes = _read_cursor(position)
    history = await _history(client, read_from, changes)
    if history is None:
        # Downloads that are being unpacked are in the history, so there are none while the history does not change.
        return DownloadSnapshot(
            tuple(_active_downloads(slots, paused)), (), dict(position.cursor), has_throughput=speed > 0
        )
    active = [
        *_active_downloads(slots, paused),
        *map(_to_processing_download, (slot for slot in history.slots if not _is_finished(slot))),
    ]
    finished_downloads = [_to_finished_download(slot) for slot in history.slots if _is_finished(slot)]
    finished = tuple(download for download in finished_downloads if download.at >= read_from)
    newest = max((download.at for download in finished), default=read_from + OVERLAP)
    is_processing = len(active) > len(slots)
    cursor = {
        "newest": newest.isoformat(),
        # SABnzbd counts post-processing as a change only when it ends.
        "changes": None if is_processing else history.changes,
        "read_at": position.at.isoformat(),
    }
    return DownloadSnapshot(tuple(active), finished, cursor, has_throughput=speed > 0)


async def finished_folders(client: Client) -> FinishedFolders:
    status = await call_api(client, "fullstatus", skip_dashboard=1)
    folder = client.parse(StatusResponse, status).status.completedir
    response = await call_api(client, "get_config", section="categories")
    categories = client.parse(CategoryResponse, response).config.categories
    known = [slot.storage async for slot in _all_history(client) if slot.storage]
    subfolders = {category.dir.rstrip("*") for category in categories if category.dir and category.dir.rstrip("*")}
    return FinishedFolders(folder, tuple(sorted(subfolders)), frozenset(known))


DOWNLOAD_TRACKER = DownloadTracker(poll, retry=retry, finished_folders=finished_folders)


async def _queue(client: Client) -> tuple[list[QueueSlot], float, bool]:
    slots: list[QueueSlot] = []
    for page in range(MAX_PAGES):
        response = await call_api(client, "queue", start=page * PAGE_SIZE, limit=PAGE_SIZE)
        queue = client.parse(QueueResponse, response).queue
        slots += queue.slots
        if len(queue.slots) < PAGE_SIZE:
            break
    return slots, queue.speed, queue.status == "Paused"  # pyright: ignore[reportPossiblyUnboundVariable]


async def _history(client: Client, read_from: datetime, changes: int | None) -> HistoryRead | None:
    """Read the history back to `read_from`. None: nothing has changed since the poll that returned `changes`."""
    slots: list[HistorySlot] = []
    change_count: int | None = None
    for page in range(MAX_PAGES):
        parameters = {} if changes is None or page else {"last_history_update": changes}
        history = await _history_page(client, page, **parameters)
        if not history:
            return None
        slots += history.slots
        change_count = history.changes if page == 0 else change_count
        finished = [slot for slot in history.slots if _is_finished(slot)]
        if len(history.slots) < PAGE_SIZE or (finished and _finished_at(finished[-1]) < read_from):
            break
    return HistoryRead(slots, change_count)


async def _all_history(client: Client) -> AsyncGenerator[HistorySlot]:
    for page in range(MAX_PAGES):
        history = await _history_page(client, page)
        for slot in history.slots if history else ():
            yield slot
        if not history or len(history.slots) < PAGE_SIZE:
            return


async def _history_page(client: Client, page: int, **parameters: int) -> History | Literal[False]:
    response = await call_api(client, "history", start=page * PAGE_SIZE, limit=PAGE_SIZE, **parameters)
    return client.parse(HistoryResponse, response).history


def _active_downloads(slots: list[QueueSlot], paused: bool) -> list[ActiveDownload]:
    """Convert the queue. SABnzbd reports all downloads as downloading, but only the first one runs."""
    current = next((slot for slot in slots if not paused and slot.status == "Downloading"), None)
    return [
        ActiveDownload(
            id=slot.nzo_id,
            title=to_single_line(slot.filename) or slot.nzo_id,
            state=STATE_BY_STATUS.get(slot.status or "", "waiting")
            if slot is current or slot.status in BUSY_STATUSES
            else "waiting",
            download_id=slot.nzo_id,
            bytes_left=None if slot.mb_left is None else int(slot.mb_left * MEBIBYTE),
            tags=(slot.cat,) if slot.cat else (),
        )
        for slot in slots
    ]


def _to_processing_download(slot: HistorySlot) -> ActiveDownload:
    return ActiveDownload(
        id=slot.nzo_id,
        title=to_single_line(slot.name) or slot.nzo_id,
        state="processing",
        download_id=slot.nzo_id,
        tags=(slot.category,) if slot.category else (),
    )


def _to_finished_download(slot: HistorySlot) -> FinishedDownload:
    return FinishedDownload(
        id=slot.nzo_id,
        title=to_single_line(slot.name) or slot.nzo_id,
        outcome="failed" if slot.status == "Failed" else "completed",
        at=_finished_at(slot),
        download_id=slot.nzo_id,
        reason=to_single_line(slot.fail_message),
        tags=(slot.category,) if slot.category else (),
    )


def _is_finished(slot: HistorySlot) -> bool:
    # While SABnzbd still processes a download (`loaded`), its status may be Completed already.
    return slot.status in {"Completed", "Failed"} and not slot.loaded


def _finished_at(slot: HistorySlot) -> datetime:
    return datetime.fromtimestamp(slot.completed or 0, UTC)


def _read_cursor(position: TrackingPosition) -> tuple[datetime, int | None]:
    """Return the time back to which the history is read, and SABnzbd's count of changes at the last poll."""
    newest, changes = position.cursor.get("newest"), position.cursor.get("changes")
    if not newest:
        return position.since.replace(microsecond=0), None
    read_from = max(datetime.fromisoformat(newest) - OVERLAP, position.since.replace(microsecond=0))
    is_stale = position.at - datetime.fromisoformat(position.cursor["read_at"]) > FULL_READ_INTERVAL
    return read_from, None if is_stale else changes
