"""Schedules: cron expressions with a time zone, which queue a job each time they are due.

A tick is a row that is unique by schedule and fire time, written with its job in one transaction. For all fire times
that passed while no dispatcher ran, one job is queued.
"""

import uuid
from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from cronsim import CronSim
from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import identity, logs
from cluster.db import now
from cluster.errors import Conflict, ForgearrError, NotFound, UnprocessableRequest
from cluster.identity import account_limits
from cluster.ownership import Principal, require, system
from cluster.times import CronExpression, TimeZoneName
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.queue import JobRequest
from jobs.states import State
from jobs.tables import Schedule, ScheduleTick

NO_SCHEDULE_SECONDS = 3600.0
MAX_NAME_LENGTH = 90
"""Jobs of a schedule are created by `schedule:NAME`, in a column of 100 characters."""


class ScheduleNotFound(NotFound):
    """There is no such schedule."""

    code = "SCHEDULE_NOT_FOUND"


class ScheduleNameTaken(Conflict):
    """There is already a schedule with this name."""

    code = "SCHEDULE_NAME_TAKEN"


class UnknownTimeZone(UnprocessableRequest):
    """This machine does not know the time zone of the schedule."""

    code = "UNKNOWN_TIME_ZONE"


class ScheduleRequest(BaseModel):
    """A job to queue at regular times."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=MAX_NAME_LENGTH, examples=["nightly"])
    kind: str = Field(max_length=100, examples=["probe"])
    spec: dict[str, Any] = Field(default_factory=dict)
    cron: CronExpression = Field(description="Minute, hour, day, month, weekday.", examples=["0 3 * * *"])
    timezone: TimeZoneName = Field(default="UTC", description="IANA name.", examples=["Europe/Berlin"])
    priority: int = Field(default=0, ge=-1000, le=1000)
    enabled: bool = True


@account_limits.measures("schedules", "schedules", "Delete one that you no longer need.")
async def count_schedules(session: AsyncSession, account_ids: Collection[str]) -> dict[str, int]:
    query = select(Schedule.owner_id, func.count()).where(Schedule.owner_id.in_(account_ids))
    rows = await session.execute(query.group_by(Schedule.owner_id))
    return {owner_id: count for owner_id, count in rows if owner_id is not None}


async def create(session: AsyncSession, request: ScheduleRequest, principal: Principal) -> Schedule:
    await account_limits.require_room(session, principal, "schedules")
    schedule = Schedule(id=str(uuid.uuid4()), owner_id=principal.id, created_by=principal.name)
    session.add(schedule)
    await replace(session, schedule, request, principal)
    return schedule


async def replace(session: AsyncSession, schedule: Schedule, request: ScheduleRequest, principal: Principal) -> None:
    job_request = JobRequest(kind=request.kind, spec=request.spec, priority=request.priority)
    _, spec = queue.check_request(job_request, principal)
    for name, value in request.model_dump().items():
        setattr(schedule, name, value)
    schedule.spec = spec
    schedule.next_fire_at = next_fire(request.cron, request.timezone, now()) if request.enabled else None
    try:
        await session.flush()
    except IntegrityError as error:
        raise ScheduleNameTaken(f"There is already a schedule named '{request.name}'.") from error
    queue.wake_dispatcher_on_commit(session)


async def get(session: AsyncSession, schedule_id: str, principal: Principal, *, lock: bool = False) -> Schedule:
    schedule = await session.get(Schedule, schedule_id, with_for_update=lock)
    return require(schedule, principal, ScheduleNotFound(f"There is no schedule '{schedule_id}'."))


async def ensure(session: AsyncSession, request: ScheduleRequest) -> None:
    """Create a schedule that the platform needs, if it does not exist. One that was changed stays as it is.

    If a schedule of another kind has the name, its id is appended to its name.
    """
    existing = await session.scalar(select(Schedule).where(Schedule.name == request.name).with_for_update())
    if existing is not None and existing.kind == request.kind:
        return
    if existing is not None:
        existing.name = f"{existing.name[: MAX_NAME_LENGTH - len(existing.id) - 1]}-{existing.id}"
        await session.flush()
    await create(session, request, system("system"))


async def fire_due(session: AsyncSession) -> None:
    """Queue a job for each schedule that is due, and set its next fire time."""
    due = await session.scalars(
        select(Schedule).where(Schedule.enabled, Schedule.next_fire_at <= now()).with_for_update(skip_locked=True)
    )
    for schedule in due.all():
        fire_at = schedule.next_fire_at or now()
        try:
            schedule.next_fire_at = next_fire(schedule.cron, schedule.timezone, now())
        except UnknownTimeZone as error:
            schedule.last_fire_at, schedule.last_job_id = fire_at, await _reject(session, schedule, error)
            continue
        if await session.get(ScheduleTick, (schedule.id, fire_at)):
            continue
        schedule.last_fire_at = fire_at
        job_id = await _fire(session, schedule)
        schedule.last_job_id = job_id
        session.add(ScheduleTick(schedule_id=schedule.id, fire_at=fire_at, job_id=job_id))
        await session.flush()


async def seconds_until_due(session: AsyncSession) -> float:
    soonest = await session.scalar(select(func.min(Schedule.next_fire_at)).where(Schedule.enabled))
    return NO_SCHEDULE_SECONDS if soonest is None else max(0.0, (soonest - now()) / timedelta(seconds=1))


def next_fire(cron: str, timezone: str, after: datetime) -> datetime:
    """Return the first fire time after `after`. The expression is evaluated in the time zone."""
    try:
        zone = ZoneInfo(timezone)
    except (ZoneInfoNotFoundError, ValueError, OSError) as error:
        # Each machine has its own list of zones, and some images have none.
        raise UnknownTimeZone(
            f"This machine does not know the time zone '{timezone}': install its list of zones (tzdata), or choose UTC."
        ) from error
    return next(CronSim(cron, after.astimezone(zone))).astimezone(UTC)


async def _fire(session: AsyncSession, schedule: Schedule) -> str:
    """Queue the job of a schedule, and return its id."""
    try:
        principal = await identity.find_principal(session, schedule.owner_id, _creator(schedule))
        return (await queue.enqueue(session, _job_request(schedule), principal)).id
    except ForgearrError as error:
        return await _reject(session, schedule, error)


async def _reject(session: AsyncSession, schedule: Schedule, error: ForgearrError) -> str:
    """Disable a schedule that cannot fire, and record a failed job with the reason. Returns the job's id.

    A schedule whose account has too many jobs stays enabled: some will have finished by its next time.
    """
    if not isinstance(error, account_limits.AccountLimitReached):
        schedule.enabled, schedule.next_fire_at = False, None
    owner = Principal(id=schedule.owner_id, name=_creator(schedule))
    reason = {"code": error.code.lower(), "message": logs.redact(error.message)}
    job = queue.rejected_job(_job_request(schedule), owner, reason)
    session.add(job)
    await session.flush()
    journal.record(session, [JournalEntry(job.id, State.FAILED, {"error": job.error})])
    return job.id


def _creator(schedule: Schedule) -> str:
    return f"schedule:{schedule.name}"


def _job_request(schedule: Schedule) -> JobRequest:
    return JobRequest(kind=schedule.kind, spec=schedule.spec, priority=schedule.priority)
