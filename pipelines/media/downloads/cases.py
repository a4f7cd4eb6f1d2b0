"""Find the services whose downloads are followed, and the downloads that need a decision about recovery."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, now
from cluster.ownership import system
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import DownloadTracker
from cluster.services.store import Service
from jobs import queue
from jobs.queue import JobRequest
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.policy import RecoveryPolicy, needs_decision
from pipelines.media.downloads.tables import FollowedDownload, FollowedService

RECOVER_KIND = "recover_downloads"
WATCHER = system("watch_downloads")
LEFTOVERS_INTERVAL = timedelta(hours=1)
MIN_RUNNING_DOWNLOADS = 2
"""If at least this many downloads run and none progresses, the cause is not a single download."""


async def followed_services(session: AsyncSession) -> list[tuple[Service, DownloadTracker]]:
    """The enabled services whose downloads can be followed, with their trackers."""
    pairs = (
        (service, service.connector.download_tracker)
        for service in await service_store.list_services(session)
        if service.enabled
    )
    return [(service, tracker) for service, tracker in pairs if tracker is not None]


async def enqueue_recovery(
    database: Database, services: Sequence[tuple[Service, DownloadTracker]], *, has_recovered: bool
) -> str | None:
    """Enqueue a recovery job if there is a case to decide, an unfinished action, or a recovered download."""
    async with database.transaction() as session:
        policy, _ = await recovery_log.current_policy(session)
        if not policy.enabled:
            return None
        is_needed = has_recovered or await recovery_log.unfinished_recoveries(session, now())
        is_needed = is_needed or await _is_leftover_check_due(session, services)
        if not is_needed and not await find_cases(session, policy, [service.id for service, _ in services], now()):
            return None
        spec = {"dry_run": None}
        return (await queue.enqueue(session, JobRequest(kind=RECOVER_KIND, spec=spec), WATCHER, unless_queued=True)).id


async def find_cases(
    session: AsyncSession,
    policy: RecoveryPolicy,
    service_ids: Iterable[int],
    at: datetime,
    *,
    ignore_delay: bool = False,
) -> list[FollowedDownload]:
    """The downloads of these services that need a decision, oldest first. `ignore_delay` includes those not due yet."""
    undecided = select(FollowedDownload).where(
        FollowedDownload.service_id.in_(list(service_ids)),
        FollowedDownload.settled.is_(False),
        FollowedDownload.state.in_(["failed", "blocked", "running"]),
    )
    if not ignore_delay:
        undecided = undecided.where(FollowedDownload.decide_at.is_(None) | (FollowedDownload.decide_at <= at))
    found = await session.scalars(undecided.order_by(FollowedDownload.moved_at, FollowedDownload.id))
    return [row for row in found if needs_decision(policy, row.state, row.strikes, row.moved_at, at)]


async def _is_leftover_check_due(session: AsyncSession, services: Sequence[tuple[Service, DownloadTracker]]) -> bool:
    ids = [service.id for service, tracker in services if tracker.finished_folders is not None]
    is_due = FollowedService.leftovers_at.is_(None) | (FollowedService.leftovers_at <= now() - LEFTOVERS_INTERVAL)
    due = select(FollowedService.service_id).where(
        FollowedService.service_id.in_(ids), FollowedService.error.is_(None), is_due
    )
    return await session.scalar(due.limit(1)) is not None
