"""Reading and locking of job rows."""

from collections.abc import Sequence

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.ownership import Principal, require
from jobs.queue.errors import JobNotFound
from jobs.states import FINISHED, Control, State
from jobs.tables import Job


async def get(session: AsyncSession, job_id: str, principal: Principal, *, lock: bool = False) -> Job:
    """The job, if this owner may see it: anybody else is told that it does not exist."""
    query = select(Job).where(Job.id == job_id)
    job = await session.scalar(query.with_for_update(key_share=True) if lock else query)
    return require(job, principal, JobNotFound(f"There is no job '{job_id}'."))


async def lock_jobs(session: AsyncSession, query: Select[Job]) -> list[Job]:
    """These jobs as they are now, locked in the order that everybody locks them in, so that they stay so."""
    ordered = query.order_by(Job.id).with_for_update(key_share=True).execution_options(populate_existing=True)
    return list(await session.scalars(ordered))


async def descendants_of(session: AsyncSession, parents: Sequence[str]) -> list[Job]:
    found: list[Job] = []
    while parents:
        children = await lock_jobs(session, select(Job).where(Job.parent_id.in_(parents), Job.state.not_in(FINISHED)))
        found += children
        parents = [child.id for child in children]
    return found


def is_paused_or_pausing(job: Job) -> bool:
    """It is paused, or will be at its next checkpoint."""
    return job.state == State.PAUSED or (job.state == State.RUNNING and job.control == Control.PAUSE)
