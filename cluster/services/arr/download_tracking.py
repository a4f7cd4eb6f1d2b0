"""How Sonarr and Radarr are followed: what is in their queue, what their history says since the last look."""

from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, Field

from cluster.services.capabilities.download_tracking import (
    ID_MAX,
    Ended,
    Following,
    Grab,
    Look,
    Outcome,
    Place,
    Replacing,
    Underway,
    UnderwayState,
    in_a_line,
)
from cluster.services.errors import NotThere
from cluster.services.http.client import Client
from cluster.times import written

API = "/api/v3"
PAGE = 500
MOST_PAGES = 20
"""A queue of more is followed up to there."""
ENDINGS: dict[str, Outcome] = {
    "downloadFolderImported": "imported",
    "seriesFolderImported": "imported",
    "movieFolderImported": "imported",
    "downloadFailed": "failed",
}
STATES: dict[str, UnderwayState] = {
    "failedPending": "failed",
    "failed": "failed",
    "importBlocked": "blocked",
    "importing": "processing",
}
OVER = {"imported", "ignored"}
GRAVEST: tuple[UnderwayState, ...] = ("failed", "blocked", "running", "processing", "waiting")


class Thing(BaseModel):
    """A series or a movie."""

    title: str = ""
    tags: tuple[int, ...] = ()


class Words(BaseModel):
    title: str | None = None
    messages: list[str] | None = None


class Sort(BaseModel):
    """What both call by names of their own."""

    series_id: int | None = Field(default=None, alias="seriesId")
    episode_id: int | None = Field(default=None, alias="episodeId")
    movie_id: int | None = Field(default=None, alias="movieId")
    series: Thing | None = None
    movie: Thing | None = None

    @property
    def thing(self) -> Thing:
        return self.series or self.movie or Thing()

    @property
    def thing_id(self) -> int | None:
        return self.series_id or self.movie_id

    @property
    def content(self) -> tuple[str, ...]:
        named = {"series": self.series_id, "episode": self.episode_id, "movie": self.movie_id}
        return tuple(f"{name}:{number}" for name, number in named.items() if number)


class QueueRow(Sort):
    id: int
    title: str | None = None
    size_left: float | None = Field(default=None, alias="sizeleft", ge=0, le=1e18)
    status: str | None = None
    tracked_status: str | None = Field(default=None, alias="trackedDownloadStatus")
    tracked_state: str | None = Field(default=None, alias="trackedDownloadState")
    messages: list[Words] | None = Field(default=None, alias="statusMessages")
    error: str | None = Field(default=None, alias="errorMessage")
    download_id: str | None = Field(default=None, alias="downloadId", max_length=ID_MAX)
    protocol: str | None = None


class QueuePage(BaseModel):
    records: list[QueueRow]


class HistoryRow(Sort):
    id: int
    source_title: str | None = Field(default=None, alias="sourceTitle")
    date: AwareDatetime
    event: str | None = Field(default=None, alias="eventType")
    download_id: str | None = Field(default=None, alias="downloadId", max_length=ID_MAX)
    data: dict[str, str | None] | None = None


class HistoryPage(BaseModel):
    records: list[HistoryRow]


class Tag(BaseModel):
    id: int
    label: str | None = None


class DownloadHandling(BaseModel):
    searches: bool = Field(alias="autoRedownloadFailed")
    searches_for_people: bool = Field(default=True, alias="autoRedownloadFailedFromInteractiveSearch")


class CommandRow(BaseModel):
    name: str | None = None
    queued: AwareDatetime | None = None
    body: dict[str, Any] | None = None


def following(thing: Literal["series", "movie"]) -> Following:
    """How the one that keeps series, or movies, is followed."""
    included: dict[str, bool] = {"includeSeries" if thing == "series" else "includeMovie": True}

    async def look(client: Client, place: Place) -> Look:
        tags = await _tags(client)
        underway = await _underway(client, included, tags)
        since, seen = _read_cursor(place)
        answer = await client.get(f"{API}/history/since", date=written(since), **included)
        rows = [row for row in client.read(list[HistoryRow], answer) if row.date >= since]
        ended = [_ended(row, thing, tags) for row in rows if row.id not in seen and row.event in ENDINGS]
        return Look(tuple(underway.values()), tuple(ended), _cursor(rows, since, seen))

    async def find(client: Client, item: str) -> Underway | None:
        tags = await _tags(client)
        return (await _underway(client, included, tags)).get(item)

    async def remove(client: Client, item: str, search: bool) -> bool:
        rows = [row async for row in _queue(client, included) if _id(row) == item]
        options = {"removeFromClient": True, "blocklist": True, "skipRedownload": not search}
        try:
            for row in rows[:1]:  # all rows of a download go together
                await client.delete(f"{API}/queue/{row.id}", **options)
        except NotThere:
            return False
        return bool(rows)

    async def grab_of(client: Client, download_id: str) -> Grab | None:
        answer = await client.get(
            f"{API}/history",
            downloadId=download_id,
            pageSize=PAGE,
            sortKey="date",
            sortDirection="descending",
            **included,
        )
        found = [row for row in client.read(HistoryPage, answer).records if row.download_id == download_id]
        grabs = [row for row in found if row.event == "grabbed"]
        if not grabs:
            return None
        tags, ends = await _tags(client), {ENDINGS.get(row.event or "") for row in found}
        return Grab(
            id=grabs[0].id,
            title=grabs[0].source_title or download_id,
            content=_joined(row.content for row in grabs),
            tags=_labels(grabs[0].thing, tags),
            failed="failed" in ends,
            imported="imported" in ends,
        )

    async def mark_failed(client: Client, grab: int) -> None:
        await client.post(f"{API}/history/failed/{grab}")

    async def searches_itself(client: Client) -> bool:
        answer = await client.get(f"{API}/config/downloadclient")
        handling = client.read(DownloadHandling, answer)
        return handling.searches and handling.searches_for_people

    async def search(client: Client, content: tuple[str, ...]) -> None:
        await client.post(f"{API}/command", _search(content))

    async def is_searching(client: Client, content: tuple[str, ...], since: datetime) -> bool:
        answer = await client.get(f"{API}/command")
        wanted = _search(content)
        return any(
            row.name == wanted["name"]
            and row.queued is not None
            and row.queued >= since
            and all((row.body or {}).get(name) == value for name, value in wanted.items() if name != "name")
            for row in client.read(list[CommandRow], answer)
        )

    replacing = Replacing(find, remove, grab_of, mark_failed, searches_itself, search, is_searching)
    return Following(look, replacing=replacing)


async def _underway(client: Client, included: dict[str, bool], tags: dict[int, str]) -> dict[str, Underway]:
    """What is in the queue by its id: a download once, for however many episodes it is."""
    downloads: dict[str, Underway] = {}
    async for row in _queue(client, included):
        if row.tracked_state in OVER:
            continue
        one = _as_underway(row, tags)
        before = downloads.get(one.id)
        if before is not None:
            gravest = min(before, one, key=lambda each: GRAVEST.index(each.state))
            one = replace(gravest, content=_joined([before.content, one.content]))
        downloads[one.id] = one
    return downloads


async def _queue(client: Client, included: dict[str, bool]) -> AsyncGenerator[QueueRow]:
    for page in range(1, MOST_PAGES + 1):
        answer = await client.get(f"{API}/queue", page=page, pageSize=PAGE, **included)
        rows = client.read(QueuePage, answer).records
        for row in rows:
            yield row
        if len(rows) < PAGE:
            return


async def _tags(client: Client) -> dict[int, str]:
    answer = await client.get(f"{API}/tag")
    return {tag.id: tag.label or str(tag.id) for tag in client.read(list[Tag], answer)}


def _as_underway(row: QueueRow, tags: dict[int, str]) -> Underway:
    return Underway(
        id=_id(row),
        title=in_a_line(row.title) or _id(row),
        state=_state(row),
        download_id=row.download_id,
        bytes_left=None if row.size_left is None else int(row.size_left),
        reason=_reason(row),
        content=row.content,
        tags=_labels(row.thing, tags),
    )


def _id(row: QueueRow) -> str:
    return row.download_id or f"queue-{row.id}"


def _state(row: QueueRow) -> UnderwayState:
    if row.tracked_state in STATES:
        return STATES[row.tracked_state]
    if row.tracked_state == "importPending":
        # Without a warning it is only waiting for its turn.
        return "processing" if row.tracked_status == "ok" else "blocked"
    if row.status == "failed":
        return "failed"
    # What comes from Usenet waits for its turn in its client, which is followed itself.
    if row.protocol == "torrent" and row.status in {"downloading", "warning"}:
        return "running"
    return "waiting"


def _reason(row: QueueRow) -> str:
    said = [message for words in row.messages or [] for message in words.messages or []]
    return in_a_line("; ".join([*([row.error] if row.error else []), *said]))


def _ended(row: HistoryRow, thing: str, tags: dict[int, str]) -> Ended:
    return Ended(
        id=row.download_id or f"history-{row.id}",
        title=in_a_line(row.source_title) or f"history-{row.id}",
        outcome=ENDINGS[row.event or ""],
        at=row.date.astimezone(UTC),
        download_id=row.download_id,
        reason=in_a_line((row.data or {}).get("message")),
        content=row.content,
        tags=_labels(row.thing, tags),
        content_id=None if row.thing_id is None else str(row.thing_id),
        content_title=in_a_line(row.thing.title) or None,
        content_type=thing,
    )


def _read_cursor(place: Place) -> tuple[datetime, set[int]]:
    """The time of the last entry that was seen, and which ones of that time were."""
    told = place.cursor.get("since")
    return datetime.fromisoformat(told) if told else place.since, set(place.cursor.get("seen", []))


def _cursor(rows: list[HistoryRow], since: datetime, seen: set[int]) -> dict[str, Any]:
    newest = max((row.date for row in rows), default=since)
    here = {row.id for row in rows if row.date == newest} | (seen if newest == since else set[int]())
    return {"since": newest.astimezone(UTC).isoformat(), "seen": sorted(here)}


def _search(content: tuple[str, ...]) -> dict[str, Any]:
    """The command that has just this searched for."""
    for name, command, field in (
        ("episode", "EpisodeSearch", "episodeIds"),
        ("movie", "MoviesSearch", "movieIds"),
    ):
        if found := [int(one.partition(":")[2]) for one in content if one.startswith(f"{name}:")]:
            return {"name": command, field: sorted(found)}
    (series,) = [int(one.partition(":")[2]) for one in content if one.startswith("series:")]
    return {"name": "SeriesSearch", "seriesId": series}


def _labels(thing: Thing, tags: dict[int, str]) -> tuple[str, ...]:
    return tuple(tags.get(number, str(number)) for number in thing.tags)


def _joined(contents: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one for content in contents for one in content))
