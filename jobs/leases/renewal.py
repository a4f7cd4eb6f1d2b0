"""Renewal of leases, and the release of lost ones."""

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
    """The running jobs of each worker."""
    jobs_by_worker: dict[str, list[Job]] = {}
    for job in await session.scalars(select(Job).where(Job.state == State.RUNNING)):
        jobs_by_worker.setdefault(job.worker or "", []).append(job)
    return jobs_by_worker


async def renew(session: AsyncSession, tokens: Collection[str]) -> dict[str, str | None]:
    """A heartbeat: renew these leases. Returns those that still hold, with what is asked of their jobs."""
    held = select(Job.id, Job.lease_token, Job.control).where(
        Job.lease_token.in_(tokens), Job.state == State.RUNNING, Job.worker.is_not(None)
    )
    rows = (await session.execute(held.order_by(Job.id).with_for_update(key_share=True))).all()
    extended = update(Job).where(Job.id.in_([row.id for row in rows])).values(lease_expires_at=new_lease_expiry())
    # A heartbeat is no news of the job.
    await session.execute(extended.values(updated_at=Job.updated_at).execution_options(synchronize_session=False))
    return {row.lease_token: row.control for row in rows}


async def release_lost_jobs(
    session: AsyncSession, *, worker: str | None = None, still_running: Collection[str] = (), count_loss: bool = True
) -> list[tuple[str, str]]:
    """Take back the jobs of a dead worker (but those), or all whose lease has run out; returns each with its worker.

    A worker that dies may have been killed by one of its jobs. The suspects go on with one loss more, the last time on
    a worker of their own, so that only the one that dies alone fails. After a power cut there is nothing to suspect.
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
    """What becomes of a job whose worker was lost: what it was asked meanwhile, or another worker."""
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
