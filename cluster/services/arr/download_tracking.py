"""Track downloads in Sonarr and Radarr: poll their queue and history, and replace failed downloads."""

from collections.abc import AsyncGenerator, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, Field

from cluster.services.capabilities.download_tracking import (
    MAX_ID_LENGTH,
    ActiveDownload,
    ActiveState,
    DownloadSnapshot,
    DownloadTracker,
    FinishedDownload,
    Grab,
    Outcome,
    ReplacementActions,
    TrackingPosition,
    to_single_line,
)
from cluster.services.errors import NotFoundInService
from cluster.services.http.client import Client
from cluster.times import format_utc

API = "/api/v3"
PAGE_SIZE = 500
MAX_PAGES = 20
"""The rest of a longer queue is ignored."""
OUTCOME_BY_EVENT: dict[str, Outcome] = {
    "downloadFolderImported": "imported",
    "seriesFolderImported": "imported",
    "movieFolderImported": "imported",
    "downloadFailed": "failed",
}
STATE_BY_TRACKED_STATE: dict[str, ActiveState] = {
    "failedPending": "failed",
    "failed": "failed",
    "importBlocked": "blocked",
    "importing": "processing",
}
FINISHED_TRACKED_STATES = {"imported", "ignored"}
STATES_BY_SEVERITY: tuple[ActiveState, ...] = ("failed", "blocked", "running", "processing", "waiting")


class ArrItem(BaseModel):
    """A series or a movie."""

    title: str = ""
    tags: tuple[int, ...] = ()


class StatusMessage(BaseModel):
    title: str | None = None
    messages: list[str] | None = None


class ItemRow(BaseModel):
    """The fields of a row that Sonarr and Radarr name differently."""

    series_id: int | None = Field(default=None, alias="seriesId")
    episode_id: int | None = Field(default=None, alias="episodeId")
    movie_id: int | None = Field(default=None, alias="movieId")
    series: ArrItem | None = None
    movie: ArrItem | None = None

    @property
    def item(self) -> ArrItem:
        return self.series or self.movie or ArrItem()

    @property
    def item_id(self) -> int | None:
        return self.series_id or self.movie_id

    @property
    def content(self) -> tuple[str, ...]:
        ids = {"series": self.series_id, "episode": self.episode_id, "movie": self.movie_id}
        return tuple(f"{name}:{number}" for name, number in ids.items() if number)


class QueueRow(ItemRow):
    id: int
    title: str | None = None
    size_left: float | None = Field(default=None, alias="sizeleft", ge=0, le=1e18)
    status: str | None = None
    tracked_status: str | None = Field(default=None, alias="trackedDownloadStatus")
    tracked_state: str | None = Field(default=None, alias="trackedDownloadState")
    messages: list[StatusMessage] | None = Field(default=None, alias="statusMessages")
    error: str | None = Field(default=None, alias="errorMessage")
    download_id: str | None = Field(default=None, alias="downloadId", max_length=MAX_ID_LENGTH)
    protocol: str | None = None


class QueuePage(BaseModel):
    records: list[QueueRow]


class HistoryRow(ItemRow):
    id: int
    source_title: str | None = Field(default=None, alias="sourceTitle")
    date: AwareDatetime
    event: str | None = Field(default=None, alias="eventType")
    download_id: str | None = Field(default=None, alias="downloadId", max_length=MAX_ID_LENGTH)
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


def download_tracker(content_type: Literal["series", "movie"]) -> DownloadTracker:
    """Build the download tracker of the service for series, or of the one for movies."""
    include_parameters: dict[str, bool] = {"includeSeries" if content_type == "series" else "includeMovie": True}

    async def poll(client: Client, position: TrackingPosition) -> DownloadSnapshot:
        tags = await _tags(client)
        active = await _active_downloads(client, include_parameters, tags)
        since, seen_ids = _read_cursor(position)
        response = await client.get(f"{API}/history/since", date=format_utc(since), **include_parameters)
        rows = [row for row in client.parse(list[HistoryRow], response) if row.date >= since]
        finished = [
            _to_finished_download(row, content_type, tags)
            for row in rows
            if row.id not in seen_ids and row.event in OUTCOME_BY_EVENT
        ]
        return DownloadSnapshot(tuple(active.values()), tuple(finished), _next_cursor(rows, since, seen_ids))

    async def find(client: Client, item_id: str) -> ActiveDownload | None:
        tags = await _tags(client)
        return (await _active_downloads(client, include_parameters, tags)).get(item_id)

    async def remove(client: Client, item_id: str, search: bool) -> bool:
        rows = [row async for row in _queue(client, include_parameters) if _item_id(row) == item_id]
        options = {"removeFromClient": True, "blocklist": True, "skipRedownload": not search}
        try:
            for row in rows[:1]:  # the service removes all rows of the download
                await client.delete(f"{API}/queue/{row.id}", **options)
        except NotFoundInService:
            return False
        return bool(rows)

    async def find_grab(client: Client, download_id: str) -> Grab | None:
        response = await client.get(
            f"{API}/history",
            downloadId=download_id,
            pageSize=PAGE_SIZE,
            sortKey="date",
            sortDirection="descending",
            **include_parameters,
        )
        rows = [row for row in client.parse(HistoryPage, response).records if row.download_id == download_id]
        grabs = [row for row in rows if row.event == "grabbed"]
        if not grabs:
            return None
        tags, outcomes = await _tags(client), {OUTCOME_BY_EVENT.get(row.event or "") for row in rows}
        return Grab(
            id=grabs[0].id,
            title=grabs[0].source_title or download_id,
            content=_merge_content(row.content for row in grabs),
            tags=_tag_labels(grabs[0].item, tags),
            failed="failed" in outcomes,
            imported="imported" in outcomes,
        )

    async def mark_failed(client: Client, grab: int) -> None:
        await client.post(f"{API}/history/failed/{grab}")

    async def searches_automatically(client: Client) -> bool:
        response = await client.get(f"{API}/config/downloadclient")
        handling = client.parse(DownloadHandling, response)
        return handling.searches and handling.searches_for_people

    async def search(client: Client, content: tuple[str, ...]) -> None:
        await client.post(f"{API}/command", _search_command(content))

    async def is_searching(client: Client, content: tuple[str, ...], since: datetime) -> bool:
        response = await client.get(f"{API}/command")
        command = _search_command(content)
        return any(
            row.name == command["name"]
            and row.queued is not None
            and row.queued >= since
            and all((row.body or {}).get(name) == value for name, value in command.items() if name != "name")
            for row in client.parse(list[CommandRow], response)
        )

    replacement = ReplacementActions(find, remove, find_grab, mark_failed, searches_automatically, search, is_searching)
    return DownloadTracker(poll, replacement=replacement)


async def _active_downloads(
    client: Client, include_parameters: dict[str, bool], tags: dict[int, str]
) -> dict[str, ActiveDownload]:
    """Return the downloads in the queue by id. A download has a row for each episode; these rows are merged."""
    downloads: dict[str, ActiveDownload] = {}
    async for row in _queue(client, include_parameters):
        if row.tracked_state in FINISHED_TRACKED_STATES:
            continue
        download = _to_active_download(row, tags)
        previous = downloads.get(download.id)
        if previous is not None:
            most_severe = min(previous, download, key=lambda candidate: STATES_BY_SEVERITY.index(candidate.state))
            download = replace(most_severe, content=_merge_content([previous.content, download.content]))
        downloads[download.id] = download
    return downloads


async def _queue(client: Client, include_parameters: dict[str, bool]) -> AsyncGenerator[QueueRow]:
    for page in range(1, MAX_PAGES + 1):
        response = await client.get(f"{API}/queue", page=page, pageSize=PAGE_SIZE, **include_parameters)
        rows = client.parse(QueuePage, response).records
        for row in rows:
            yield row
        if len(rows) < PAGE_SIZE:
            return


async def _tags(client: Client) -> dict[int, str]:
    response = await client.get(f"{API}/tag")
    return {tag.id: tag.label or str(tag.id) for tag in client.parse(list[Tag], response)}


def _to_active_download(row: QueueRow, tags: dict[int, str]) -> ActiveDownload:
    return ActiveDownload(
        id=_item_id(row),
        title=to_single_line(row.title) or _item_id(row),
        state=_state(row),
        download_id=row.download_id,
        bytes_left=None if row.size_left is None else int(row.size_left),
        reason=_reason(row),
        content=row.content,
        tags=_tag_labels(row.item, tags),
    )


def _item_id(row: QueueRow) -> str:
    return row.download_id or f"queue-{row.id}"


def _state(row: QueueRow) -> ActiveState:
    if row.tracked_state in STATE_BY_TRACKED_STATE:
        return STATE_BY_TRACKED_STATE[row.tracked_state]
    if row.tracked_state == "importPending":
        # Without a warning, it only waits for its import.
        return "processing" if row.tracked_status == "ok" else "blocked"
    if row.status == "failed":
        return "failed"
    # A download from Usenet is tracked in its download client.
    if row.protocol == "torrent" and row.status in {"downloading", "warning"}:
        return "running"
    return "waiting"


def _reason(row: QueueRow) -> str:
    messages = [message for status_message in row.messages or [] for message in status_message.messages or []]
    return to_single_line("; ".join([*([row.error] if row.error else []), *messages]))


def _to_finished_download(row: HistoryRow, content_type: str, tags: dict[int, str]) -> FinishedDownload:
    return FinishedDownload(
        id=row.download_id or f"history-{row.id}",
        title=to_single_line(row.source_title) or f"history-{row.id}",
        outcome=OUTCOME_BY_EVENT[row.event or ""],
        at=row.date.astimezone(UTC),
        download_id=row.download_id,
        reason=to_single_line((row.data or {}).get("message")),
        content=row.content,
        tags=_tag_labels(row.item, tags),
        content_id=None if row.item_id is None else str(row.item_id),
        content_title=to_single_line(row.item.title) or None,
        content_type=content_type,
    )


def _read_cursor(position: TrackingPosition) -> tuple[datetime, set[int]]:
    """Return the time of the newest row that was read, and the ids of the rows of that time."""
    since = position.cursor.get("since")
    return datetime.fromisoformat(since) if since else position.since, set(position.cursor.get("seen", []))


def _next_cursor(rows: list[HistoryRow], since: datetime, seen_ids: set[int]) -> dict[str, Any]:
    newest = max((row.date for row in rows), default=since)
    newest_ids = {row.id for row in rows if row.date == newest} | (seen_ids if newest == since else set[int]())
    return {"since": newest.astimezone(UTC).isoformat(), "seen": sorted(newest_ids)}


def _search_command(content: tuple[str, ...]) -> dict[str, Any]:
    """Build the command that searches for exactly this content."""
    for name, command, field in (
        ("episode", "EpisodeSearch", "episodeIds"),
        ("movie", "MoviesSearch", "movieIds"),
    ):
        if ids := [int(item.partition(":")[2]) for item in content if item.startswith(f"{name}:")]:
            return {"name": command, field: sorted(ids)}
    (series,) = [int(item.partition(":")[2]) for item in content if item.startswith("series:")]
    return {"name": "SeriesSearch", "seriesId": series}


def _tag_labels(item: ArrItem, tags: dict[int, str]) -> tuple[str, ...]:
    return tuple(tags.get(tag_id, str(tag_id)) for tag_id in item.tags)


def _merge_content(contents: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part for content in contents for part in content))
