"""Dependencies between jobs: link them, and release or fail the jobs that wait when others finish."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from cluster.ownership import Principal, can_access
from jobs import journal
from jobs.journal import JournalEntry
from jobs.queue.errors import END_TEXTS, ChildFailed, UnknownDependency
from jobs.queue.rows import lock_jobs
from jobs.queue.wakeup import wake_dispatcher_on_commit
from jobs.states import RETRYABLE, State
from jobs.tables import Job, JobDependency


async def finish_waiting_jobs(
    session: AsyncSession, waiting: Sequence[Job], state: State, error: dict[str, Any]
) -> None:
    """Finish jobs that no worker runs, and update the jobs that depend on them."""
    for job in waiting:
        job.state, job.error, job.finished_at, job.control = state, error, now(), None
    journal.record(session, [JournalEntry(job.id, state, {"error": error}) for job in waiting])
    await release_dependents(session, {job.id: state for job in waiting})


async def release_dependents(session: AsyncSession, finished: dict[str, State]) -> None:
    """Update the jobs that wait for these: each has one unfinished dependency less, or fails."""
    links = await session.execute(
        select(JobDependency.job_id, JobDependency.depends_on_id).where(JobDependency.depends_on_id.in_(finished))
    )
    failed_dependencies: dict[str, str] = {}
    for job_id, dependency_id in links.all():
        if finished[dependency_id] != State.SUCCEEDED:
            failed_dependencies[job_id] = dependency_id
            continue
        await session.execute(
            update(Job)
            .where(Job.id == job_id, Job.unfinished_dependencies > 0)
            .values(unfinished_dependencies=Job.unfinished_dependencies - 1)
        )
        wake_dispatcher_on_commit(session)
    if not failed_dependencies:
        return
    waiting = select(Job).where(Job.id.in_(failed_dependencies), Job.state.in_([State.QUEUED, State.PAUSED]))
    for dependent in await lock_jobs(session, waiting):
        cause = await session.get_one(Job, failed_dependencies[dependent.id], populate_existing=True)
        error = {
            "code": "dependency_failed",
            "message": f"{cause.id}, which this job depends on, {END_TEXTS[finished[cause.id]]}.",
        }
        if cause.parent_id == dependent.id:
            error = {"code": ChildFailed.code.lower(), "message": ChildFailed(cause).message}
        await finish_waiting_jobs(session, [dependent], State.FAILED, error)


async def link_dependencies(
    session: AsyncSession, job: Job, dependency_ids: Sequence[str], principal: Principal
) -> None:
    if not dependency_ids:
        return
    # Locked, so that none of them finishes between this query and our commit.
    rows = await session.scalars(select(Job).where(Job.id.in_(set(dependency_ids))).with_for_update(read=True))
    known = {other.id: other for other in rows if can_access(other, principal)}
    for dependency_id in dict.fromkeys(dependency_ids):
        if dependency_id not in known:
            raise UnknownDependency(f"There is no job '{dependency_id}' to depend on.")
        session.add(JobDependency(job_id=job.id, depends_on_id=dependency_id))
    await session.flush()
    states = {other.id: State(other.state) for other in known.values()}
    job.unfinished_dependencies = sum(state != State.SUCCEEDED for state in states.values())
    await session.flush()
    unsuccessful = {key: state for key, state in states.items() if state in RETRYABLE}
    if unsuccessful:
        await release_dependents(session, unsuccessful)
