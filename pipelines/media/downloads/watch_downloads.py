"""The kind `watch_downloads`: poll the downloads of every followed service, and announce failures and imports.

A download is recorded and counted in one transaction, and announced after its commit. So each failure and import is
announced at most once, even if jobs overlap or die. Recovery is left to `recover_downloads`.
"""

import asyncio
from typing import Any

from pydantic import BaseModel, ConfigDict

from cluster.db import Database, run_with_database
from cluster.secrets import SealBroken
from cluster.services.capabilities.download_tracking import DownloadTracker
from cluster.services.errors import ServiceError
from cluster.services.store import Service
from cluster.settings import get_settings
from jobs.context import Context
from jobs.registry import job
from jobs.schedules import ScheduleRequest
from jobs.sweep import register_sweeper
from pipelines.media.downloads import log as recovery_log
from pipelines.media.downloads import tables as download_tables
from pipelines.media.downloads.cases import enqueue_recovery, followed_services
from pipelines.media.downloads.poll import PollResult, poll_service, record_error

KIND = "watch_downloads"
MAX_CONCURRENCY = 8


class WatchDownloadsSpec(BaseModel):
    model_config = ConfigDict(extra="forbid")


@job(KIND, spec=WatchDownloadsSpec, admin_only=True, concurrency=1, routine=True)
def watch_downloads(context: Context, spec: WatchDownloadsSpec) -> dict[str, Any]:
    """Polls the downloads of every service that can be followed, and announces failures and imports."""
    return run_with_database(lambda database: _watch(context, database))


def schedule() -> ScheduleRequest:
    return ScheduleRequest(name="watch-downloads", kind=KIND, cron=get_settings().media.watch_cron)


@register_sweeper("downloads")
async def remove_old_downloads(database: Database) -> int:
    return await download_tables.remove_old(database)


@register_sweeper("recoveries")
async def remove_old_recoveries(database: Database) -> int:
    return await recovery_log.remove_old(database)


async def _watch(context: Context, database: Database) -> dict[str, Any]:
    async with database.read_transaction() as session:
        services = await followed_services(session)
    context.report(phase=f"{len(services)} services")
    semaphore = asyncio.Semaphore(MAX_CONCURRENCY)

    async def poll_one(service: Service, tracker: DownloadTracker) -> PollResult | str:
        async with semaphore:
            try:
                return await poll_service(database, service, tracker)
            except (ServiceError, SealBroken) as error:
                await record_error(database, service, error.message)
                return error.message

    outcomes = await asyncio.gather(*(poll_one(*pair) for pair in services))
    results = [outcome for outcome in outcomes if isinstance(outcome, PollResult)]
    recovered = sum(result.recovered for result in results)
    recover_job_id = await enqueue_recovery(database, services, has_recovered=recovered > 0)
    return {
        "looked_at": len(results),
        "unseen": {
            service.name: outcome
            for (service, _), outcome in zip(services, outcomes, strict=True)
            if isinstance(outcome, str)
        },
        "failed": sum(result.failed for result in results),
        "added": sum(result.added for result in results),
        "recovered": recovered,
        "recover_job_id": recover_job_id,
    }
