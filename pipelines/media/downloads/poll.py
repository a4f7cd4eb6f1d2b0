"""One poll of one service: new rows, changes and ends of downloads."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import events
from cluster.db import Database, after_commit, now, one_at_a_time
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import Ended, Following, Look, Place, Underway
from cluster.services.store import Service
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.cases import ENOUGH
from pipelines.media.downloads.policy import next_strikes
from pipelines.media.downloads.tables import FollowedDownload, FollowedService

IDS_AT_ONCE = 500


@dataclass
class Seen:
    """What one look has changed."""

    failed: int = 0
    added: int = 0
    recovered: int = 0


async def look_at(database: Database, service: Service, following: Following) -> Seen:
    """Look at a service, and note what is new."""
    async with database.reading() as session:
        place, looks = await _place(session, service)
    async with service_store.connected(database, service) as client:
        look = await following.look(client, place)
    async with database.transaction() as session:
        return await _settle(session, service, look, place.at, looks, mends_itself=following.retry is None)


async def _place(session: AsyncSession, service: Service) -> tuple[Place, int]:
    known = await session.get(FollowedService, service.id)
    if known is None or known.connected_as_of != service.connected_as_of:
        return Place(since=service.connected_as_of, at=now()), 0 if known is None else known.looks
    return Place(since=service.connected_as_of, at=now(), cursor=known.cursor), known.looks


async def _settle(
    session: AsyncSession, service: Service, look: Look, at: datetime, looks: int, *, mends_itself: bool
) -> Seen:
    # One download may be told of by two services, so one of them is noted after the other.
    await one_at_a_time(session, FollowedDownload.__tablename__)
    if await session.get(Service, service.id) is None:
        return Seen()  # it was deleted meanwhile
    known = await session.get(FollowedService, service.id, with_for_update=True)
    if known is None:
        known = FollowedService(service_id=service.id, looks=0, completed=0, failed=0, imported=0)
        session.add(known)
    if known.looks != looks:
        return Seen()  # somebody else has looked meanwhile, and noted what is newer
    known.connected_as_of, known.cursor, known.error = service.connected_as_of, look.cursor, None
    known.looks, known.looked_at = looks + 1, at
    # A service is asked for its queue before its history, and what ends in between is in both.
    over = {one.id for one in look.ended}
    still = [one for one in look.underway if one.id not in over]
    known.underway = len(still)
    known.bytes_left = sum(one.bytes_left or 0 for one in still)
    seen = Seen()
    rows = await _rows(session, service.id, look)
    for ended in look.ended:
        await _note_end(session, known, rows, ended, seen, mends_itself=mends_itself)
    moves = look.moves and _any_moves(rows, still)
    for underway in still:
        await _note_underway(session, known, rows, underway, moves, at, seen)
    await _note_gone(session, rows, look, at)
    return seen


async def _rows(session: AsyncSession, service_id: int, look: Look) -> dict[str, FollowedDownload]:
    """What was known before of what this look has seen, and of what was underway."""
    here = select(FollowedDownload).where(FollowedDownload.service_id == service_id)
    found = list(await session.scalars(here.where(FollowedDownload.ended_at.is_(None))))
    ids = sorted({one.id for one in (*look.underway, *look.ended)})
    for start in range(0, len(ids), IDS_AT_ONCE):
        page = ids[start : start + IDS_AT_ONCE]
        found += await session.scalars(here.where(FollowedDownload.item.in_(page)))
    return {row.item: row for row in found}


def _any_moves(rows: Mapping[str, FollowedDownload], underway: Iterable[Underway]) -> bool:
    """Whether one of several has got on. If none has, it is the line; of one alone, nobody knows."""
    running = [one for one in underway if one.state == "running"]
    left = [(row.bytes_left, one.bytes_left) for one in running if (row := rows.get(one.id)) is not None]
    got_on = any(before is not None and after is not None and after < before for before, after in left)
    return got_on or len(running) < ENOUGH


async def _note_end(
    session: AsyncSession,
    known: FollowedService,
    rows: dict[str, FollowedDownload],
    ended: Ended,
    seen: Seen,
    *,
    mends_itself: bool,
) -> None:
    if ended.outcome != "failed":
        seen.recovered += await recovery_log.came_good(
            session, known.service_id, [ended.title], ended.content, ended.at
        )
    row = rows.get(ended.id)
    if row is not None and row.state in {ended.outcome, "retried"} and row.ended_at is not None:
        return  # an old story
    if row is None:
        row = rows[ended.id] = _new_row(session, known.service_id, ended, ended.at)
    was_failed = row.state == "failed"
    row.state, row.reason, row.ended_at, row.moved_at = ended.outcome, ended.reason, ended.at, ended.at
    row.tags, row.content = list(ended.tags), list(dict.fromkeys([*row.content, *ended.content]))
    row.bytes_left, row.strikes, row.decide_at = None, 0, None
    # Who chose a download, and notes that it has failed, has dealt with it.
    row.settled = ended.outcome != "failed" or mends_itself
    match ended.outcome:
        case "failed":
            known.failed += not was_failed
            await _tell_failure(session, row, seen)
        case "completed":
            known.completed += 1
        case "imported":
            known.imported += 1
            _tell_addition(session, row, ended, seen)


async def _note_underway(
    session: AsyncSession,
    known: FollowedService,
    rows: dict[str, FollowedDownload],
    underway: Underway,
    moves: bool,
    at: datetime,
    seen: Seen,
) -> None:
    row = rows.get(underway.id)
    if row is not None and row.ended_at is not None and underway.state != "failed" and row.state == "imported":
        return  # it is about to leave the queue
    if row is None:
        row = rows[underway.id] = _new_row(session, known.service_id, underway, at)
    is_new_failure = underway.state == "failed" and row.state != "failed"
    strikes = next_strikes(row.strikes, underway.state, row.bytes_left, underway.bytes_left, moves)
    if not strikes or row.state != underway.state or row.ended_at is not None:
        row.moved_at, row.settled, row.decide_at = at, False, None
    if row.reason != underway.reason:
        row.settled, row.decide_at = False, None
    row.title, row.state, row.reason, row.strikes = underway.title, underway.state, underway.reason, strikes
    row.tags, row.content = list(underway.tags), list(underway.content)
    row.bytes_left, row.ended_at = underway.bytes_left, None
    if is_new_failure:
        known.failed += 1
        await _tell_failure(session, row, seen)


async def _note_gone(session: AsyncSession, rows: dict[str, FollowedDownload], look: Look, at: datetime) -> None:
    """What was underway and is nowhere any more; a failure is remembered, so that it is not told again."""
    here = {one.id for one in look.underway}
    for row in rows.values():
        if row.ended_at is not None or row.item in here:
            continue
        if row.state == "failed":
            row.ended_at, row.settled = at, True
        else:
            await session.delete(row)


def _new_row(session: AsyncSession, service_id: int, one: Underway | Ended, at: datetime) -> FollowedDownload:
    row = FollowedDownload(
        service_id=service_id,
        item=one.id,
        download_id=one.download_id,
        title=one.title,
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


async def _tell_failure(session: AsyncSession, row: FollowedDownload, seen: Seen) -> None:
    if row.told:
        return
    row.told = True
    await session.flush()
    if row.download_id is not None and await _was_told(session, row):
        return
    seen.failed += 1
    _tell(
        session,
        "downloads",
        "download.failed",
        {"download_id": row.download_id or row.item, "title": row.title, "reason": row.reason},
    )


async def _was_told(session: AsyncSession, row: FollowedDownload) -> bool:
    """Whether another service has told of the same download that it failed."""
    others = select(FollowedDownload.id).where(
        FollowedDownload.download_id == row.download_id,
        FollowedDownload.id != row.id,
        FollowedDownload.told,
        FollowedDownload.state.in_(["failed", "retried"]),
    )
    return await session.scalar(others.limit(1)) is not None


def _tell_addition(session: AsyncSession, row: FollowedDownload, ended: Ended, seen: Seen) -> None:
    row.told = True
    seen.added += 1
    title = ended.content_title or ended.title
    told = {"request_id": None, "content_id": ended.content_id, "title": title, "type": ended.content_type}
    _tell(session, "content_requests", "content.added", told)


def _tell(session: AsyncSession, room: str, kind: str, data: dict[str, Any]) -> None:
    message = events.message([room], kind, data, now())
    after_commit(session, lambda: events.publish([message]))


async def note_error(database: Database, service: Service, message: str) -> None:
    async with database.transaction() as session:
        if known := await session.get(FollowedService, service.id, with_for_update=True):
            known.looked_at, known.error = now(), message
