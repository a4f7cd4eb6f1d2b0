"""Renew leases, and release the jobs whose workers are lost."""

from collections.abc import Collection

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from cluster.settings import get_settings
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.leases.claim import OWN_WORKER, new_lease_expiry
from jobs.leases.outcomes import cancelled_values, finished_values, paused_values, released_values
from jobs.states import FINISHED, Control, State
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
    extended = update(Job).where(Job.id.in_([row.id for row in rows])).values(lease_expires_at=new_lease_expiry())
    # A heartbeat is no update of the job.
    await session.execute(extended.values(updated_at=Job.updated_at).execution_options(synchronize_session=False))
    return {row.lease_token: row.control for row in rows}


async def release_lost_jobs(
    session: AsyncSession, *, worker: str | None = None, still_running: Collection[str] = (), count_loss: bool = True
) -> list[tuple[str, str]]:
    """Release the jobs of a dead worker that are not `still_running`, or all jobs with an expired lease.

    Returns each job with its worker. A worker that dies may have been killed by one of its jobs. So each of them is
    counted one loss, and runs on a worker of its own before its losses are too many: only a job that kills that worker
    fails. `count_loss` is false if no job can have killed the worker, as after a power cut.
    """
    is_lost = Job.worker == worker if worker else Job.lease_expires_at < now()
    rows = await session.scalars(
        select(Job)
        .where(Job.state == State.RUNNING, is_lost, Job.id.not_in(still_running))
        .order_by(Job.id)
        .with_for_update(key_share=True)
    )
    released = [(job, job.worker or "") for job in rows.all()]
    for job, _ in released:
        await _release(session, job, count_loss)
    if released:
        queue.wake_dispatcher_on_commit(session)
    return [(job.id, name) for job, name in released]


async def _release(session: AsyncSession, job: Job, count_loss: bool) -> None:
    """Release a job whose worker was lost: apply its control request, or queue it for another worker."""
    job.losses += count_loss
    if job.losses >= get_settings().jobs.max_losses - 1 and not job.demand:
        job.demand = OWN_WORKER
    if job.control == Control.CANCEL:
        values, entry = cancelled_values(), JournalEntry(job.id, "cancelled")
    elif job.losses >= get_settings().jobs.max_losses:
        message = f"Its worker was lost {job.losses} times, the last time with no other job on it."
        error = {"code": "worker_lost", "message": message}
        values, entry = (
            finished_values(State.FAILED) | {"error": error},
            JournalEntry(job.id, "failed", {"error": error}),
        )
    elif job.control == Control.PAUSE:
        values, entry = paused_values(), JournalEntry(job.id, "paused")
    else:
        values, entry = released_values(State.QUEUED), JournalEntry(job.id, "queued", {"lost_worker": job.worker})
    for column, value in values.items():
        setattr(job, column, value)
    await session.flush()
    journal.record(session, [entry])
    if job.state in FINISHED:
        await queue.release_dependents(session, {job.id: State(job.state)})
