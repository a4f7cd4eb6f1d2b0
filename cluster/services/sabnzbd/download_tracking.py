"""How SABnzbd is followed: its queue, and what its history has that is new."""

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from cluster.services.capabilities.download_tracking import (
    ID_MAX,
    Ended,
    Finished,
    Following,
    Look,
    Place,
    Underway,
    UnderwayState,
    in_a_line,
)
from cluster.services.http.client import Client
from cluster.services.sabnzbd.downloads import Text, ask, retry

PAGE = 200
MOST_PAGES = 50
LATEST = 253_402_300_799
"""The last second that a time can have."""
OVERLAP = timedelta(hours=1)
"""Entries are in the order of a clock that may have been set back."""
WHOLE_AFTER = timedelta(minutes=15)
"""SABnzbd counts the changes of its history from 1 again when it starts, so its word for "nothing new" is not taken for
longer than this."""
MEBIBYTE = 1024 * 1024
AT_WORK = {"Checking", "Grabbing", "Fetching"}
Id = Annotated[str, Field(min_length=1, max_length=ID_MAX)]
TURN: dict[str, UnderwayState] = {**dict.fromkeys(AT_WORK, "processing"), "Downloading": "running"}


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


class QueueAnswer(BaseModel):
    queue: Queue


class HistorySlot(BaseModel):
    nzo_id: Id
    name: Text = ""
    status: str | None = None
    category: str | None = None
    fail_message: Text = ""
    completed: int | None = Field(default=None, ge=0, le=LATEST)
    storage: str | None = None
    loaded: bool = False


class History(BaseModel):
    slots: list[HistorySlot]
    changes: int | None = Field(default=None, alias="last_history_update")


class HistoryAnswer(BaseModel):
    history: History | Literal[False]


class FullStatus(BaseModel):
    completedir: str = Field(min_length=1)


class StatusAnswer(BaseModel):
    status: FullStatus


class Category(BaseModel):
    dir: str | None = None


class CategoryList(BaseModel):
    categories: list[Category] = []  # it does not name a list that is empty


class CategoryAnswer(BaseModel):
    config: CategoryList


@dataclass(frozen=True)
class Read:
    """What was read of the history: None, if nothing has changed."""

    slots: list[HistorySlot]
    changes: int | None


async def look(client: Client, place: Place) -> Look:
    slots, speed, paused = await _queue(client)
    floor, changes = _read_cursor(place)
    read = await _history(client, floor, changes)
    if read is None:
        # What is unpacked is in the history too; there is none of that while nothing changes there.
        return Look(tuple(_underway(slots, paused)), (), dict(place.cursor), moves=speed > 0)
    underway = [*_underway(slots, paused), *map(_processing, (slot for slot in read.slots if not _is_over(slot)))]
    over = [_ended(slot) for slot in read.slots if _is_over(slot)]
    ended = tuple(one for one in over if one.at >= floor)
    newest = max((one.at for one in ended), default=floor + OVERLAP)
    busy = len(underway) > len(slots)
    cursor = {
        "newest": newest.isoformat(),
        # Post-processing does not count as a change until it is over.
        "changes": None if busy else read.changes,
        "read_at": place.at.isoformat(),
    }
    return Look(tuple(underway), ended, cursor, moves=speed > 0)


async def finished(client: Client) -> Finished:
    status = await ask(client, "fullstatus", skip_dashboard=1)
    folder = client.read(StatusAnswer, status).status.completedir
    answer = await ask(client, "get_config", section="categories")
    categories = client.read(CategoryAnswer, answer).config.categories
    known = [slot.storage async for slot in _all_history(client) if slot.storage]
    subfolders = {category.dir.rstrip("*") for category in categories if category.dir and category.dir.rstrip("*")}
    return Finished(folder, tuple(sorted(subfolders)), frozenset(known))


FOLLOWING = Following(look, retry=retry, finished=finished)


async def _queue(client: Client) -> tuple[list[QueueSlot], float, bool]:
    slots: list[QueueSlot] = []
    for page in range(MOST_PAGES):
        answer = await ask(client, "queue", start=page * PAGE, limit=PAGE)
        queue = client.read(QueueAnswer, answer).queue
        slots += queue.slots
        if len(queue.slots) < PAGE:
            break
    return slots, queue.speed, queue.status == "Paused"  # pyright: ignore[reportPossiblyUnboundVariable]


async def _history(client: Client, floor: datetime, changes: int | None) -> Read | None:
    """Entries down to what ended at `floor`, or None if nothing has changed since."""
    slots: list[HistorySlot] = []
    counted: int | None = None
    for page in range(MOST_PAGES):
        unless = {} if changes is None or page else {"last_history_update": changes}
        history = await _page(client, page, **unless)
        if not history:
            return None
        slots += history.slots
        counted = history.changes if page == 0 else counted
        over = [slot for slot in history.slots if _is_over(slot)]
        if len(history.slots) < PAGE or (over and _time(over[-1]) < floor):
            break
    return Read(slots, counted)


async def _all_history(client: Client) -> AsyncGenerator[HistorySlot]:
    for page in range(MOST_PAGES):
        history = await _page(client, page)
        for slot in history.slots if history else ():
            yield slot
        if not history or len(history.slots) < PAGE:
            return


async def _page(client: Client, page: int, **unless: int) -> History | Literal[False]:
    answer = await ask(client, "history", start=page * PAGE, limit=PAGE, **unless)
    return client.read(HistoryAnswer, answer).history


def _underway(slots: list[QueueSlot], paused: bool) -> list[Underway]:
    """Downloads run one after another, though SABnzbd calls all of them downloading: the first one is."""
    turn = next((slot for slot in slots if not paused and slot.status == "Downloading"), None)
    return [
        Underway(
            id=slot.nzo_id,
            title=in_a_line(slot.filename) or slot.nzo_id,
            state=TURN.get(slot.status or "", "waiting") if slot is turn or slot.status in AT_WORK else "waiting",
            download_id=slot.nzo_id,
            bytes_left=None if slot.mb_left is None else int(slot.mb_left * MEBIBYTE),
            tags=(slot.cat,) if slot.cat else (),
        )
        for slot in slots
    ]


def _processing(slot: HistorySlot) -> Underway:
    return Underway(
        id=slot.nzo_id,
        title=in_a_line(slot.name) or slot.nzo_id,
        state="processing",
        download_id=slot.nzo_id,
        tags=(slot.category,) if slot.category else (),
    )


def _ended(slot: HistorySlot) -> Ended:
    return Ended(
        id=slot.nzo_id,
        title=in_a_line(slot.name) or slot.nzo_id,
        outcome="failed" if slot.status == "Failed" else "completed",
        at=_time(slot),
        download_id=slot.nzo_id,
        reason=in_a_line(slot.fail_message),
        tags=(slot.category,) if slot.category else (),
    )


def _is_over(slot: HistorySlot) -> bool:
    # What it still has in its hands may be called completed already.
    return slot.status in {"Completed", "Failed"} and not slot.loaded


def _time(slot: HistorySlot) -> datetime:
    return datetime.fromtimestamp(slot.completed or 0, UTC)


def _read_cursor(place: Place) -> tuple[datetime, int | None]:
    """From when on the history is read, and how many changes the last look has seen of it."""
    told, changes = place.cursor.get("newest"), place.cursor.get("changes")
    if not told:
        return place.since.replace(microsecond=0), None
    floor = max(datetime.fromisoformat(told) - OVERLAP, place.since.replace(microsecond=0))
    stale = place.at - datetime.fromisoformat(place.cursor["read_at"]) > WHOLE_AFTER
    return floor, None if stale else changes
