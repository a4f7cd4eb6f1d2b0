"""The kind `sweep`: delete expired data of the queue, files, logins, audit log, and of all modules with a sweeper."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta

from pydantic import BaseModel, ConfigDict
from sqlalchemy import and_, delete, false, select

from cluster import audit_log, backup, identity
from cluster.db import Database, delete_rows, now, run_with_database
from cluster.files import store as file_store
from cluster.files import uploads as file_uploads
from cluster.settings import get_settings
from jobs import retention
from jobs.context import Context
from jobs.registry import job, kinds
from jobs.schedules import ScheduleRequest
from jobs.states import FINISHED
from jobs.tables import IdempotencyKey, Job, JobEvent, Leadership, ScheduleTick

SWEEP_PAGE = 5000
SWEEP_SCHEDULE = ScheduleRequest(name="sweep", kind="sweep", cron="17 * * * *")

Sweeper = Callable[[Database], Awaitable[int]]
_sweepers: dict[str, Sweeper] = {}


def register_sweeper(name: str) -> Callable[[Sweeper], Sweeper]:
    """Decorator: make a function, in a module that is named in `jobs.modules`, a part of every sweep.

    The function deletes expired data, and returns how many items it deleted.
    """

    def declare(function: Sweeper) -> Sweeper:
        _sweepers[name] = function
        return function

    return declare


class SweepSpec(BaseModel):
    model_config = ConfigDict(extra="forbid")


@job("sweep", spec=SweepSpec, admin_only=True, concurrency=1, routine=True)
def sweep(context: Context, spec: SweepSpec) -> dict[str, int]:
    """Deletes old jobs and events, expired keys, logins, files and uploads, and expired data of other modules."""
    return run_with_database(lambda database: _sweep(context, database))


async def _sweep(context: Context, database: Database) -> dict[str, int]:
    event_days = get_settings().jobs.event_days
    async with database.transaction() as session:
        keys = await delete_rows(session, delete(IdempotencyKey).where(IdempotencyKey.expires_at <= now()))
        old_ticks = now() - timedelta(days=event_days)
        await delete_rows(session, delete(ScheduleTick).where(ScheduleTick.fire_at < old_ticks))
        logins = await identity.delete_expired_logins(session)
    context.report(progress=50, phase="old events")
    events = 0
    while page := await _delete_old_events(database, event_days):
        events += page
        context.report(phase=f"{events} old events")
    expired = await file_store.remove_expired(database)
    uploads = await file_uploads.remove_expired(database)
    audit_entries = await audit_log.remove_old(database)
    await asyncio.to_thread(backup.remove_leftovers)
    kinds()  # imports all modules, so that they have registered their sweepers
    others: dict[str, int] = {}
    for name, remove_old in _sweepers.items():
        context.report(phase=f"old {name}")
        others[name] = await remove_old(database)
    jobs = await retention.delete_expired(database, lambda count: context.report(phase=f"{count} old jobs"))
    context.report(phase="remains of deleted jobs")
    await retention.delete_remains(database)
    return {
        "idempotency_keys": keys,
        "logins": logins,
        "jobs": jobs,
        "events": events,
        "files": expired,
        "uploads": uploads,
        "audit_log": audit_entries,
        **others,
    }


async def _delete_old_events(database: Database, days: float) -> int:
    """Delete a page of old events of finished jobs, except those that were not sent to MLflow yet."""
    async with database.transaction() as session:
        synced_until = await session.scalar(select(Leadership.tracked_until)) or 0
        is_unsynced = and_(JobEvent.id > synced_until, Job.tracked) if get_settings().mlflow_uri else false()
        old = (
            select(JobEvent.id)
            .join(Job, Job.id == JobEvent.job_id)
            .where(JobEvent.created_at < now() - timedelta(days=days), Job.state.in_(FINISHED))
            .where(~is_unsynced)
            .limit(SWEEP_PAGE)
        )
        return await delete_rows(session, delete(JobEvent).where(JobEvent.id.in_(old)))
