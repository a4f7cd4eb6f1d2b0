"""Kind `watch_downloads`: looks at the downloads of every service that can be followed, and tells what is new.

What was seen is a row, written in the transaction that counts it and has it told after its commit: so each failure and
each import is told once, whoever looks, and whatever dies. What needs mending is left to `recover_downloads`.
"""

import asyncio
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.db import Database, apart
from cluster.secrets import SealBroken
from cluster.services.capabilities.download_tracking import Following
from cluster.services.errors import ServiceError
from cluster.services.store import Service
from cluster.settings import get_settings
from jobs.context import Context
from jobs.registry import job
from jobs.schedules import ScheduleRequest
from jobs.sweep import sweeper
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads import tables as download_tables
from pipelines.media.downloads.cases import ask_to_recover, followed_services
from pipelines.media.downloads.poll import Seen, look_at, note_error

KIND = "watch_downloads"
AT_ONCE = 8


class WatchDownloadsSpec(BaseModel):
    """A look needs nothing."""

    model_config = ConfigDict(extra="forbid")


@job(KIND, spec=WatchDownloadsSpec, admin_only=True, concurrency=1)
def watch_downloads(context: Context, spec: WatchDownloadsSpec) -> dict[str, Any]:
    """Looks at the downloads of every service that can be followed, and tells what has failed or was imported."""
    return asyncio.run(apart(lambda database: _watch(context, database)))


def schedule() -> ScheduleRequest:
    return ScheduleRequest(name="watch-downloads", kind=KIND, cron=get_settings().media.watch_cron)


@sweeper("downloads")
async def remove_old_downloads(database: Database) -> int:
    return await download_tables.remove_old(database)


@sweeper("recoveries")
async def remove_old_recoveries(database: Database) -> int:
    return await recovery_log.remove_old(database)


async def _watch(context: Context, database: Database) -> dict[str, Any]:
    async with database.reading() as session:
        services = await followed_services(session)
    context.report(phase=f"{len(services)} services")
    room = asyncio.Semaphore(AT_ONCE)

    async def one(service: Service, following: Following) -> Seen | str:
        async with room:
            try:
                return await look_at(database, service, following)
            except (ServiceError, SealBroken) as error:
                await note_error(database, service, error.message)
                return error.message

    outcomes = await asyncio.gather(*(one(*pair) for pair in services))
    seen = [outcome for outcome in outcomes if isinstance(outcome, Seen)]
    recovered = sum(one.recovered for one in seen)
    asked = await ask_to_recover(database, services, came_good=recovered > 0)
    return {
        "looked_at": len(seen),
        "unseen": {
            service.name: outcome
            for (service, _), outcome in zip(services, outcomes, strict=True)
            if isinstance(outcome, str)
        },
        "failed": sum(one.failed for one in seen),
        "added": sum(one.added for one in seen),
        "recovered": recovered,
        "recover_job_id": asked,
    }
