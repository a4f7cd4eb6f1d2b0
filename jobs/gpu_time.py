"""The GPU time of accounts: the setting `limits.account_gpu_hours`. It counts the last 24 hours, from the journal."""

from collections.abc import Collection, Iterable
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from cluster.identity import User, account_limits
from jobs.registry import Resources
from jobs.states import State
from jobs.tables import Job, JobEvent

WINDOW = timedelta(days=1)
SECONDS_PER_HOUR = 3600
USES_GPU: ColumnElement[bool] = Job.resources["gpus"].as_float() > 0


async def exhausted_accounts(session: AsyncSession) -> set[str]:
    """The accounts of users whose queued jobs must not get a GPU now, because they had theirs for today."""
    limit = account_limits.limit_of("gpu_hours")
    if limit is None:
        return set()
    waiting = (
        select(Job.owner_id)
        .join(User, User.id == Job.owner_id)
        .where(User.role != "admin", Job.state == State.QUEUED, Job.demand > "", USES_GPU)
        .distinct()
    )
    used = await count_gpu_seconds(session, [account for account in await session.scalars(waiting) if account])
    return {account for account, seconds in used.items() if seconds >= limit * SECONDS_PER_HOUR}


def wait_reason() -> str:
    limit = account_limits.limit_of("gpu_hours")
    return f"GPU time: its account has reached the limit of {limit} GPU hours in 24 hours (limits.account_gpu_hours)"


@account_limits.measures("gpu_hours", "GPU hours", "Wait until the last 24 hours have fewer.", unit=SECONDS_PER_HOUR)
async def count_gpu_seconds(session: AsyncSession, account_ids: Collection[str]) -> dict[str, int]:
    """The seconds in which the jobs of each account have run in the last 24 hours, times their GPUs."""
    moment = now()
    since = moment - WINDOW
    recent = or_(Job.state == State.RUNNING, Job.updated_at >= since)
    jobs = list(await session.scalars(select(Job).where(Job.owner_id.in_(account_ids), recent, USES_GPU)))
    query = select(JobEvent).where(JobEvent.job_id.in_([job.id for job in jobs]), JobEvent.type.in_(list(State)))
    changes: dict[str, list[JobEvent]] = {}
    for event in await session.scalars(query.order_by(JobEvent.id)):
        changes.setdefault(event.job_id, []).append(event)
    used: dict[str, float] = {}
    for job in jobs:
        resources = Resources.model_validate(job.resources)
        seconds = _running_seconds(changes.get(job.id, []), since, moment)
        owner = job.owner_id or ""
        used[owner] = used.get(owner, 0) + seconds * resources.gpus * resources.workers
    return {account: int(seconds) for account, seconds in used.items()}


def _running_seconds(changes: Iterable[JobEvent], since: datetime, until: datetime) -> float:
    total, started_at = timedelta(), None
    for change in changes:
        if started_at is not None:
            total += max(change.created_at - max(started_at, since), timedelta())
        started_at = change.created_at if change.type == State.RUNNING else None
    if started_at is not None:
        total += until - max(started_at, since)
    return total.total_seconds()
