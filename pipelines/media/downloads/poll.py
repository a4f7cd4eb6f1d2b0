"""Poll one service, and record its new, changed and finished downloads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import events
from cluster.db import Database, advisory_lock, after_commit, now
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import (
    ActiveDownload,
    DownloadSnapshot,
    DownloadTracker,
    FinishedDownload,
    TrackingPosition,
)
from cluster.services.store import Service
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.cases import MIN_RUNNING_DOWNLOADS
from pipelines.media.downloads.policy import next_strikes
from pipelines.media.downloads.tables import FollowedDownload, FollowedService

MAX_IDS_PER_QUERY = 500


@dataclass
class PollResult:
    """The numbers of changes that one poll has found."""

    failed: int = 0
    added: int = 0
    recovered: int = 0


async def poll_service(database: Database, service: Service, tracker: DownloadTracker) -> PollResult:
    """Poll a service, store its downloads, and publish failures and imports that are new."""
    async with database.read_transaction() as session:
        cursor, poll_count = await _load_cursor(session, service)
    async with service_store.open_client(database, service) as client:
        snapshot = await tracker.poll(client, cursor)
    async with database.transaction() as session:
        return await _save_snapshot(
            session, service, snapshot, cursor.at, poll_count, recovers_itself=tracker.retry is None
        )


async def _load_cursor(session: AsyncSession, service: Service) -> tuple[TrackingPosition, int]:
    followed = await session.get(FollowedService, service.id)
    if followed is None or followed.connected_as_of != service.connected_as_of:
        return TrackingPosition(since=service.connected_as_of, at=now()), 0 if followed is None else followed.looks
    return TrackingPosition(since=service.connected_as_of, at=now(), cursor=followed.cursor), followed.looks


async def _save_snapshot(
    session: AsyncSession,
    service: Service,
    snapshot: DownloadSnapshot,
    at: datetime,
    poll_count: int,
    *,
    recovers_itself: bool,
) -> PollResult:
    # Two services may report the same download: the lock lets the second one see what the first one has announced.
    await advisory_lock(session, FollowedDownload.__tablename__)
    if await session.get(Service, service.id) is None:
        return PollResult()  # it was deleted meanwhile
    followed = await session.get(FollowedService, service.id, with_for_update=True)
    if followed is None:
        followed = FollowedService(service_id=service.id, looks=0, completed=0, failed=0, imported=0)
        session.add(followed)
    if followed.looks != poll_count:
        return PollResult()  # another poll was faster, and has stored a newer snapshot
    followed.connected_as_of, followed.cursor, followed.error = service.connected_as_of, snapshot.cursor, None
    followed.looks, followed.looked_at = poll_count + 1, at
    # The queue is read before the history, so a download that ends in between is in both.
    ended_ids = {one.id for one in snapshot.finished}
    active = [one for one in snapshot.active if one.id not in ended_ids]
    followed.underway = len(active)
    followed.bytes_left = sum(one.bytes_left or 0 for one in active)
    result = PollResult()
    rows = await _load_rows(session, service.id, snapshot)
    for finished in snapshot.finished:
        await _record_finished(session, followed, rows, finished, result, recovers_itself=recovers_itself)
    is_transferring = snapshot.has_throughput and _is_transferring(rows, active)
    for download in active:
        await _record_active(session, followed, rows, download, is_transferring, at, result)
    await _remove_vanished(session, rows, snapshot, at)
    return result


async def _load_rows(session: AsyncSession, service_id: int, snapshot: DownloadSnapshot) -> dict[str, FollowedDownload]:
    """The rows of active downloads, and of those in the snapshot."""
    service_rows = select(FollowedDownload).where(FollowedDownload.service_id == service_id)
    found = list(await session.scalars(service_rows.where(FollowedDownload.ended_at.is_(None))))
    ids = sorted({one.id for one in (*snapshot.active, *snapshot.finished)})
    for start in range(0, len(ids), MAX_IDS_PER_QUERY):
        batch = ids[start : start + MAX_IDS_PER_QUERY]
        found += await session.scalars(service_rows.where(FollowedDownload.item.in_(batch)))
    return {row.item: row for row in found}


def _is_transferring(rows: Mapping[str, FollowedDownload], active: Iterable[ActiveDownload]) -> bool:
    """Whether a lack of progress says something about a single download.

    If several run and none progresses, the connection is the cause. With one alone, the cause is unknown.
    """
    running = [one for one in active if one.state == "running"]
    bytes_left_pairs = [(row.bytes_left, one.bytes_left) for one in running if (row := rows.get(one.id)) is not None]
    has_progress = any(
        before is not None and after is not None and after < before for before, after in bytes_left_pairs
    )
    return has_progress or len(running) < MIN_RUNNING_DOWNLOADS


async def _record_finished(
    session: AsyncSession,
    followed: FollowedService,
    rows: dict[str, FollowedDownload],
    finished: FinishedDownload,
    result: PollResult,
    *,
    recovers_itself: bool,
) -> None:
    if finished.outcome != "failed":
        result.recovered += await recovery_log.mark_recovered(
            session, followed.service_id, [finished.title], finished.content, finished.at
        )
    row = rows.get(finished.id)
    if row is not None and row.state in {finished.outcome, "retried"} and row.ended_at is not None:
        return  # already recorded
    if row is None:
        row = rows[finished.id] = _new_row(session, followed.service_id, finished, finished.at)
    was_failed = row.state == "failed"
    row.state, row.reason, row.ended_at, row.moved_at = finished.outcome, finished.reason, finished.at, finished.at
    row.tags, row.content = list(finished.tags), list(dict.fromkeys([*row.content, *finished.content]))
    row.bytes_left, row.strikes, row.decide_at = None, 0, None
    # A service that chose the download and records its failure handles it itself.
    row.settled = finished.outcome != "failed" or recovers_itself
    match finished.outcome:
        case "failed":
            followed.failed += not was_failed
            await _announce_failure(session, row, result)
        case "completed":
            followed.completed += 1
        case "imported":
            followed.imported += 1
            _announce_addition(session, row, finished, result)


async def _record_active(
    session: AsyncSession,
    followed: FollowedService,
    rows: dict[str, FollowedDownload],
    active: ActiveDownload,
    is_transferring: bool,
    at: datetime,
    result: PollResult,
) -> None:
    row = rows.get(active.id)
    if row is not None and row.ended_at is not None and active.state != "failed" and row.state == "imported":
        return  # it was imported, and will leave the queue
    if row is None:
        row = rows[active.id] = _new_row(session, followed.service_id, active, at)
    is_new_failure = active.state == "failed" and row.state != "failed"
    strikes = next_strikes(row.strikes, active.state, row.bytes_left, active.bytes_left, is_transferring)
    if not strikes or row.state != active.state or row.ended_at is not None:
        row.moved_at, row.settled, row.decide_at = at, False, None
    if row.reason != active.reason:
        row.settled, row.decide_at = False, None
    row.title, row.state, row.reason, row.strikes = active.title, active.state, active.reason, strikes
    row.tags, row.content = list(active.tags), list(active.content)
    row.bytes_left, row.ended_at = active.bytes_left, None
    if is_new_failure:
        followed.failed += 1
        await _announce_failure(session, row, result)


async def _remove_vanished(
    session: AsyncSession, rows: dict[str, FollowedDownload], snapshot: DownloadSnapshot, at: datetime
) -> None:
    """Delete the rows of active downloads that are gone. Failures are kept, so that they are not announced again."""
    active_ids = {one.id for one in snapshot.active}
    for row in rows.values():
        if row.ended_at is not None or row.item in active_ids:
            continue
        if row.state == "failed":
            row.ended_at, row.settled = at, True
        else:
            await session.delete(row)


def _new_row(
    session: AsyncSession, service_id: int, download: ActiveDownload | FinishedDownload, at: datetime
) -> FollowedDownload:
    row = FollowedDownload(
        service_id=service_id,
        item=download.id,
        download_id=download.download_id,
        title=download.title,
        state="waiting",
        reason="",
        tags=[],
        content=[],
        strikes=0,
        moved_at=at,
        told=False,
        settled=False,
    )
    session.add(row)
    return row


async def _announce_failure(session: AsyncSession, row: FollowedDownload, result: PollResult) -> None:
    if row.told:
        return
    row.told = True
    await session.flush()
    if row.download_id is not None and await _was_announced(session, row):
        return
    result.failed += 1
    _publish_event(
        session,
        "downloads",
        "download.failed",
        {"download_id": row.download_id or row.item, "title": row.title, "reason": row.reason},
    )


async def _was_announced(session: AsyncSession, row: FollowedDownload) -> bool:
    """Whether the failure of the same download was already announced for another service."""
    others = select(FollowedDownload.id).where(
        FollowedDownload.download_id == row.download_id,
        FollowedDownload.id != row.id,
        FollowedDownload.told,
        FollowedDownload.state.in_(["failed", "retried"]),
    )
    return await session.scalar(others.limit(1)) is not None


def _announce_addition(
    session: AsyncSession, row: FollowedDownload, finished: FinishedDownload, result: PollResult
) -> None:
    row.told = True
    result.added += 1
    title = finished.content_title or finished.title
    payload = {"request_id": None, "content_id": finished.content_id, "title": title, "type": finished.content_type}
    _publish_event(session, "content_requests", "content.added", payload)


def _publish_event(session: AsyncSession, room: str, event_type: str, data: dict[str, Any]) -> None:
    message = events.build_message([room], event_type, data, now())
    after_commit(session, lambda: events.publish([message]))


async def record_error(database: Database, service: Service, message: str) -> None:
    async with database.transaction() as session:
        if followed := await session.get(FollowedService, service.id, with_for_update=True):
            followed.looked_at, followed.error = now(), message
