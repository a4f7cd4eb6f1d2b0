"""Downloads that may need recovery."""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, now
from cluster.ownership import Owner
from cluster.services import store as service_store
from cluster.services.capabilities.download_tracking import Following
from cluster.services.store import Service
from jobs import queue
from jobs.queue import JobRequest
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads.policy import RecoveryPolicy, is_case
from pipelines.media.downloads.tables import FollowedDownload, FollowedService

RECOVER = "recover_downloads"
WATCH = Owner(name="watch_downloads")
LEFTOVERS_EVERY = timedelta(hours=1)
ENOUGH = 2
"""So many downloads that stand still at once do so for a reason that is not theirs."""


async def followed_services(session: AsyncSession) -> list[tuple[Service, Following]]:
    """Those that are enabled and can be followed."""
    found = (
        (service, service.connector.following) for service in await service_store.every(session) if service.enabled
    )
    return [(service, following) for service, following in found if following is not None]


async def ask_to_recover(
    database: Database, services: Sequence[tuple[Service, Following]], *, came_good: bool
) -> str | None:
    """A job that mends, if there is something to decide, or something has come of an earlier one."""
    async with database.transaction() as session:
        policy, _ = await recovery_log.policy_of(session)
        if not policy.enabled:
            return None
        wanted = came_good or await recovery_log.unended(session, now())
        wanted = wanted or await _has_leftovers_to_look_for(session, services)
        if not wanted and not await cases(session, policy, [service.id for service, _ in services], now()):
            return None
        spec = {"dry_run": None}
        return (await queue.enqueue(session, JobRequest(kind=RECOVER, spec=spec), WATCH, unless_queued=True)).id


async def cases(
    session: AsyncSession, policy: RecoveryPolicy, service_ids: Iterable[int], at: datetime, *, early: bool = False
) -> list[FollowedDownload]:
    """Downloads of these services about which there is something to decide, now or `early`, the oldest first."""
    undecided = select(FollowedDownload).where(
        FollowedDownload.service_id.in_(list(service_ids)),
        FollowedDownload.settled.is_(False),
        FollowedDownload.state.in_(["failed", "blocked", "running"]),
    )
    if not early:
        undecided = undecided.where(FollowedDownload.decide_at.is_(None) | (FollowedDownload.decide_at <= at))
    found = await session.scalars(undecided.order_by(FollowedDownload.moved_at, FollowedDownload.id))
    return [row for row in found if is_case(policy, row.state, row.strikes, row.moved_at, at)]


async def _has_leftovers_to_look_for(session: AsyncSession, services: Sequence[tuple[Service, Following]]) -> bool:
    ids = [service.id for service, following in services if following.finished is not None]
    is_due = FollowedService.leftovers_at.is_(None) | (FollowedService.leftovers_at <= now() - LEFTOVERS_EVERY)
    due = select(FollowedService.service_id).where(
        FollowedService.service_id.in_(ids), FollowedService.error.is_(None), is_due
    )
    return await session.scalar(due.limit(1)) is not None
