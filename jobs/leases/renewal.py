"""Renew leases: the heartbeats of workers."""

from collections.abc import Collection

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from jobs.states import State
from jobs.tables import Job


async def running_jobs_by_worker(session: AsyncSession) -> dict[str, list[Job]]:
    jobs_by_worker: dict[str, list[Job]] = {}
    for job in await session.scalars(select(Job).where(Job.state == State.RUNNING)):
        jobs_by_worker.setdefault(job.worker or "", []).append(job)
    return jobs_by_worker


async def renew(session: AsyncSession, tokens: Collection[str]) -> dict[str, str | None]:
    """Renew these leases: a heartbeat. Returns the tokens that are valid, with the control request of each job."""
    valid = select(Job.id, Job.lease_token, Job.control).where(
        Job.lease_token.in_(tokens), Job.state == State.RUNNING, Job.worker.is_not(None)
    )
    rows = (await session.execute(valid.order_by(Job.id).with_for_update(key_share=True))).all()
    renewed = update(Job).where(Job.id.in_([row.id for row in rows])).values(heartbeats=Job.heartbeats + 1)
    # A heartbeat is no update of the job.
    await session.execute(renewed.values(updated_at=Job.updated_at).execution_options(synchronize_session=False))
    return {row.lease_token: row.control for row in rows}
