"""List and control the downloads of SABnzbd.

SABnzbd sends numbers as text, reports success for calls without effect, and accepts a list of ids, or `all`, in place
of one. So one id of an existing download is sent at a time, and the effect is verified with another call.
"""

import asyncio
import re
from datetime import UTC, datetime
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field

from cluster.logs import strip_url_paths
from cluster.services.capabilities.downloads import (
    DownloadHistory,
    DownloadHistoryItem,
    DownloadNotFailed,
    DownloadNotFound,
    DownloadQueue,
    Downloads,
    QueuedDownload,
    QueuePauseState,
)
from cluster.services.errors import Refused
from cluster.services.http.client import Client

ID = re.compile(r"[A-Za-z0-9_-]{1,100}")
MEGABYTE = 1024 * 1024
MAX_TIMESTAMP = datetime(9999, 12, 31, tzinfo=UTC).timestamp()
FINISHED_STATUSES = {"Completed", "Failed"}
MAX_LOOKUPS, LOOKUP_INTERVAL_SECONDS = 10, 0.2
"""While SABnzbd reads an NZB, or moves a download from its queue to its history, it lists the download nowhere."""

PRIORITIES = {2: "Force", 1: "High", 0: "Normal", -1: "Low", -2: "Paused", -3: "Duplicate", -4: "Stop"}


def _redact_url(value: Any) -> Any:
    """Cut the URL in a name. While SABnzbd fetches an NZB, the download is named by its URL, which contains a key."""
    return strip_url_paths(value) if isinstance(value, str) else "" if value is None else value


def _priority_name(value: Any) -> Any:
    """Return the name of a priority. While SABnzbd fetches an NZB, the priority is a number."""
    return PRIORITIES.get(value, str(value)) if isinstance(value, int) else "" if value is None else value


Text = Annotated[str, BeforeValidator(_redact_url)]
Priority = Annotated[str, BeforeValidator(_priority_name)]
Amount = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Timestamp = Annotated[float, Field(ge=0, le=MAX_TIMESTAMP)]


class QueueSlot(BaseModel):
    nzo_id: str
    filename: Text = ""
    mb: Amount
    mbleft: Amount
    percentage: int
    timeleft: Text = ""
    status: str
    priority: Priority = ""


class Queue(BaseModel):
    slots: list[QueueSlot]
    paused: bool
    status: str
    kbpersec: Amount
    mbleft: Amount
    diskspace1: Amount | None = None


class QueueResponse(BaseModel):
    queue: Queue


class HistorySlot(BaseModel):
    nzo_id: str
    name: Text = ""
    category: str | None = None
    status: str
    fail_message: Text = ""
    bytes: Amount = 0
    completed: Timestamp | None = None
    retry: bool = False  # whether it can be retried
    loaded: bool = False  # whether it is still being processed, although its status may be Completed already


class History(BaseModel):
    slots: list[HistorySlot]
    noofslots: Annotated[int, Field(ge=0)]


class HistoryResponse(BaseModel):
    history: History


class Retried(BaseModel):
    nzo_id: str


class Removed(BaseModel):
    nzo_ids: list[str]


class Added(BaseModel):
    nzo_ids: Annotated[list[str], Field(min_length=1)]


async def queue(client: Client) -> DownloadQueue:
    current = await _queue(client)
    return DownloadQueue(
        queue=[
            QueuedDownload(
                nzo_id=slot.nzo_id,
                filename=slot.filename,
                mb_left=slot.mbleft,
                mb=slot.mb,
                percentage=min(100, max(0, slot.percentage)),
                eta=_eta(slot.timeleft) if current.kbpersec else None,
                status=slot.status,
                priority=slot.priority,
            )
            for slot in current.slots
        ],
        speed=f"{format_bytes(current.kbpersec * 1024)}/s",
        size_left=format_bytes(current.mbleft * MEGABYTE),
        paused=current.paused,
        disk_space=None if current.diskspace1 is None else format_bytes(current.diskspace1 * 1024 * MEGABYTE),
    )


async def history(client: Client, limit: int) -> DownloadHistory:
    page = await _history(client, limit=limit)
    return DownloadHistory(history=[_to_history_item(slot) for slot in page.slots[:limit]], total=page.noofslots)


async def retry(client: Client, nzo_id: str) -> str:
    """Retry a failed download, and return the id of the new one."""
    name, slot = client.connection.name, await _find_in_history(client, nzo_id)
    if slot is None:
        if await _find_queued(client, nzo_id):
            raise DownloadNotFailed(f"'{nzo_id}' is still in the queue of {name}; only a failed one can be retried.")
        raise DownloadNotFound(f"{name} has no download '{nzo_id}' in its history.")
    if slot.status != "Failed":
        raise DownloadNotFailed(f"'{slot.name}' is {slot.status}; only a failed download can be retried.")
    if not slot.retry:
        raise Refused(f"{name} cannot retry '{slot.name}': its files are gone.")
    new_id = client.parse(Retried, await call_api_once(client, "retry", value=nzo_id)).nzo_id
    await _require_present(client, new_id, slot.name)
    return new_id


async def delete(client: Client, nzo_id: str, with_files: bool) -> None:
    """Delete a download from the queue."""
    name = client.connection.name
    if await _find_queued(client, nzo_id) is None:
        if slot := await _find_in_history(client, nzo_id):
            raise DownloadNotFound(f"'{slot.name}' is no longer in the queue of {name}: it is {slot.status}.")
        raise DownloadNotFound(f"{name} has no download '{nzo_id}' in its queue.")
    response = await call_api_once(client, "queue", name="delete", value=nzo_id, del_files=int(with_files))
    if await _find_queued(client, nzo_id):
        raise Refused(f"{name} still has '{nzo_id}' in its queue.")
    if nzo_id not in client.parse(Removed, response).nzo_ids:
        raise DownloadNotFound(f"'{nzo_id}' had already left the queue of {name}.")


async def pause(client: Client) -> QueuePauseState:
    await call_api_once(client, "pause")
    return await _require_paused(client, expected=True)


async def resume(client: Client) -> QueuePauseState:
    await call_api_once(client, "resume")
    return await _require_paused(client, expected=False)


async def add(client: Client, url: str, name: str, category: str) -> str:
    """Add the NZB at this URL to the queue, and return the id of the download."""
    options = {"nzbname": name, "cat": category}
    response = await call_api_once(
        client, "addurl", name=url, **{key: value for key, value in options.items() if value}
    )
    added = client.parse(Added, response).nzo_ids[0]
    await _require_present(client, added, name or _redact_url(url))
    return added


async def call_api(client: Client, mode: str, **parameters: Any) -> Any:
    return await client.get("/api", mode=mode, output="json", **parameters)


async def call_api_once(client: Client, mode: str, **parameters: Any) -> Any:
    """Send a call that changes something. It is never repeated: a repeated one could add a download twice."""
    return await client.get_once("/api", mode=mode, output="json", **parameters)


DOWNLOADS = Downloads(queue=queue, history=history, retry=retry, delete=delete, pause=pause, resume=resume)


async def _queue(client: Client, **parameters: Any) -> Queue:
    return client.parse(QueueResponse, await call_api(client, "queue", **parameters)).queue


async def _history(client: Client, **parameters: Any) -> History:
    return client.parse(HistoryResponse, await call_api(client, "history", **parameters)).history


async def _find_queued(client: Client, nzo_id: str) -> QueueSlot | None:
    queued = await _queue(client, nzo_ids=_validate_id(nzo_id))
    return next((slot for slot in queued.slots if slot.nzo_id == nzo_id), None)


async def _find_in_history(client: Client, nzo_id: str) -> HistorySlot | None:
    past = await _history(client, nzo_ids=_validate_id(nzo_id))
    return next((slot for slot in past.slots if slot.nzo_id == nzo_id), None)


def _validate_id(nzo_id: str) -> str:
    if not ID.fullmatch(nzo_id):
        raise DownloadNotFound(f"There is no download '{nzo_id[:100]}'.")
    return nzo_id


async def _require_present(client: Client, nzo_id: str, name: str) -> None:
    for attempt in range(MAX_LOOKUPS):
        await asyncio.sleep(LOOKUP_INTERVAL_SECONDS if attempt else 0)
        if await _find_queued(client, nzo_id) or await _find_in_history(client, nzo_id):
            return
    raise Refused(f"{client.connection.name} accepted '{name}', but does not have it.")


async def _require_paused(client: Client, *, expected: bool) -> QueuePauseState:
    current = await _queue(client, limit=1)
    if current.paused is not expected:
        raise Refused(f"{client.connection.name} is {'still' if current.paused else 'not'} paused.")
    return QueuePauseState(paused=current.paused, queue_status=current.status)


def _to_history_item(slot: HistorySlot) -> DownloadHistoryItem:
    is_finished = slot.status in FINISHED_STATUSES and not slot.loaded and slot.completed is not None
    return DownloadHistoryItem(
        nzo_id=slot.nzo_id,
        name=slot.name,
        category=slot.category,
        status=slot.status,
        fail_message=slot.fail_message,
        size=format_bytes(slot.bytes),
        completed=datetime.fromtimestamp(slot.completed or 0, UTC) if is_finished else None,
    )


def _eta(time_left: str) -> str | None:
    """Convert 0:15:30 to 00:15:30, and 2:01:00:00 to 49:00:00. SABnzbd sends 0:00:00 for an unknown time."""
    parts = time_left.split(":")
    if not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts) or len(parts) > 4:
        return None
    days, hours, minutes, seconds = [0] * (4 - len(parts)) + [int(part) for part in parts]
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    return f"{total // 3600:02}:{total // 60 % 60:02}:{total % 60:02}" if total else None


UNITS = ("B", "KB", "MB", "GB", "TB", "PB")


def format_bytes(count: float) -> str:
    for unit in UNITS[:-1]:
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} {UNITS[-1]}"
