"""Read and lock the rows of jobs."""

from collections.abc import Collection, Sequence

from sqlalchemy import Select, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.identity import account_limits
from cluster.ownership import Principal, require
from jobs.queue.errors import JobNotFound
from jobs.states import FINISHED, Control, State
from jobs.tables import UNFINISHED, Job


async def get(session: AsyncSession, job_id: str, principal: Principal, *, lock: bool = False) -> Job:
    """Return the job if this principal may see it. Else it is not found."""
    query = select(Job).where(Job.id == job_id)
    job = await session.scalar(query.with_for_update(key_share=True) if lock else query)
    return require(job, principal, JobNotFound(f"There is no job '{job_id}'."))


async def lock_jobs(session: AsyncSession, query: Select[Job]) -> list[Job]:
    """Lock these jobs, and return their current rows. All code locks jobs in this order, to prevent deadlocks."""
    ordered = query.order_by(Job.id).with_for_update(key_share=True).execution_options(populate_existing=True)
    return list(await session.scalars(ordered))


@account_limits.measures("jobs", "unfinished jobs", "Wait until some of them have finished, or cancel some.")
async def count_unfinished(
    session: AsyncSession, account_ids: Collection[str], kind: str | None = None
) -> dict[str, int]:
    """Count the unfinished jobs of each account, or those of one kind. Children of jobs do not count."""
    query = select(Job.owner_id, func.count()).where(Job.owner_id.in_(account_ids), text(UNFINISHED))
    if kind is not None:
        query = query.where(Job.kind == kind)
    rows = await session.execute(query.group_by(Job.owner_id))
    return {owner_id: count for owner_id, count in rows if owner_id is not None}


async def descendants_of(session: AsyncSession, parents: Sequence[str]) -> list[Job]:
    descendants: list[Job] = []
    while parents:
        children = await lock_jobs(session, select(Job).where(Job.parent_id.in_(parents), Job.state.not_in(FINISHED)))
        descendants += children
        parents = [child.id for child in children]
    return descendants


def is_paused_or_pausing(job: Job) -> bool:
    return job.state == State.PAUSED or (job.state == State.RUNNING and job.control == Control.PAUSE)
