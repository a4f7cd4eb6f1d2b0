"""The kind `check_services`: check the health of outside services, on a schedule and when one was added or changed."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, run_with_database
from cluster.ownership import LOCAL, Principal
from cluster.services import health_checks
from cluster.services import store as service_store
from cluster.settings import get_settings
from jobs import queue, schedules
from jobs.context import Context
from jobs.queue import JobRequest
from jobs.registry import job
from jobs.schedules import ScheduleRequest
from jobs.sweep import register_sweeper
from pipelines.media.downloads import cases, watch_downloads

KIND = "check_services"


class CheckServicesSpec(BaseModel):
    """The services to check."""

    model_config = ConfigDict(extra="forbid")

    service_id: int | None = Field(default=None, ge=1, le=2**63 - 1, description="Only this one. Null: all.")


@job(KIND, spec=CheckServicesSpec, admin_only=True, routine=True)
def check_services(context: Context, spec: CheckServicesSpec) -> dict[str, Any]:
    """Checks the health of every enabled service, or of one, and stores the results."""
    return run_with_database(lambda database: _check(context, spec, database))


async def enqueue_check(session: AsyncSession, service_id: int, principal: Principal) -> None:
    """Enqueue a check of a new or changed service. With the first service, the schedule of checks starts."""
    await _ensure_schedules(session)
    await queue.enqueue(session, JobRequest(kind=KIND, spec={"service_id": service_id}), principal)


async def declare_services(database: Database) -> None:
    """Store the services that the settings declare, and check all. Called when Forgearr starts."""
    async with database.transaction() as session:
        await service_store.declare(session, get_settings().services.declared)
        if await service_store.list_services(session):
            await _ensure_schedules(session)
            await queue.enqueue(session, JobRequest(kind=KIND), LOCAL)  # the last check may be long ago


@register_sweeper("service_checks")
async def remove_old_checks(database: Database) -> int:
    return await health_checks.remove_old(database)


async def _check(context: Context, spec: CheckServicesSpec, database: Database) -> dict[str, Any]:
    async with database.read_transaction() as session:
        services = [
            service
            for service in await service_store.list_services(session)
            if service.enabled and spec.service_id in {None, service.id}
        ]
    context.report(phase=f"{len(services)} services")
    outcomes = await health_checks.check_all(database, services)
    unhealthy = {
        service.name: outcome.error
        for service, outcome in zip(services, outcomes, strict=True)
        if outcome and not outcome.healthy
    }
    return {"checked": len(services), "unhealthy": unhealthy}


async def _ensure_schedules(session: AsyncSession) -> None:
    await schedules.ensure(session, _schedule())
    if await cases.followed_services(session):
        await schedules.ensure(session, watch_downloads.schedule())


def _schedule() -> ScheduleRequest:
    return ScheduleRequest(name="check-services", kind=KIND, cron=get_settings().services.check_cron)
