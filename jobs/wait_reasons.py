"""Explain to people what a queued job waits for: the field `waiting_for`."""

from collections.abc import Sequence
from datetime import timedelta

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from cluster.settings import get_settings
from jobs.states import State
from jobs.tables import Job, JobDependency, Leadership

MAX_NAMED = 3
"""This many unfinished dependencies are named; the rest is counted."""


async def reasons(session: AsyncSession, jobs: Sequence[Job]) -> dict[str, str]:
    """Return the reason of each of these jobs that is queued, by job id."""
    queued = [job for job in jobs if job.state == State.QUEUED]
    if not queued:
        return {}
    leader = await session.get(Leadership, 1)
    dependencies = await _unfinished_dependencies(session, [job.id for job in queued if job.unfinished_dependencies])
    return {job.id: _reason(job, leader, dependencies.get(job.id, [])) for job in queued}


def _reason(job: Job, leader: Leadership | None, dependencies: Sequence[str]) -> str:
    if dependencies:
        more = f" and {len(dependencies) - MAX_NAMED} more" if len(dependencies) > MAX_NAMED else ""
        return f"{', '.join(dependencies[:MAX_NAMED])}{more} to succeed"
    if job.run_after > now():
        cause = "the next attempt" if job.attempt > 1 else "its time"
        return f"{cause}, {job.run_after:%Y-%m-%d %H:%M:%S}Z"
    if leader is None or leader.renewed_at < now() - timedelta(seconds=get_settings().jobs.lease_seconds):
        return "a dispatcher; none is running"
    if job.resources.get("gpus") and (reason := leader.waiting.get(f"account {job.owner_id}")):
        return reason
    return leader.waiting.get(f"kind {job.kind}") or leader.waiting.get(f"demand {job.demand}") or "its turn"


async def _unfinished_dependencies(session: AsyncSession, job_ids: Sequence[str]) -> dict[str, list[str]]:
    if not job_ids:
        return {}
    links = await session.execute(
        select(JobDependency.job_id, JobDependency.depends_on_id)
        .join(Job, Job.id == JobDependency.depends_on_id)
        .where(JobDependency.job_id.in_(job_ids), Job.state != State.SUCCEEDED)
        .order_by(JobDependency.depends_on_id)
    )
    dependencies: dict[str, list[str]] = {}
    for job_id, dependency_id in links.all():
        dependencies.setdefault(job_id, []).append(dependency_id)
    return dependencies
