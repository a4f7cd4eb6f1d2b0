"""Release the jobs whose workers are lost, and find those that kill their workers."""

import hashlib
import json
from collections.abc import Collection, Sequence

from sqlalchemy import ColumnElement, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.settings import get_settings
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.leases.claim import OWN_WORKER
from jobs.leases.outcomes import cancelled_values, finished_values, paused_values, released_values
from jobs.leases.watch import LeaseWatch
from jobs.registry import Resources
from jobs.states import FINISHED, Control, State
from jobs.tables import Job


async def release_expired_jobs(session: AsyncSession, watch: LeaseWatch) -> list[tuple[str, str]]:
    """Release the jobs whose leases have expired. Returns each with its worker."""
    rows = await session.execute(select(Job.lease_token, Job.heartbeats).where(Job.state == State.RUNNING))
    expired = watch.find_expired({row.lease_token: row.heartbeats for row in rows.all()})
    if not expired:
        return []
    jobs = await _lock_running(session, Job.lease_token.in_(list(expired)))
    # Not one whose worker has renewed its lease since then.
    return await _release_all(session, [job for job in jobs if expired.get(job.lease_token or "") == job.heartbeats])


async def release_lost_jobs(
    session: AsyncSession, worker: str, *, still_running: Collection[str] = (), count_loss: bool = True
) -> list[tuple[str, str]]:
    """Release the jobs of a dead worker that are not `still_running`. Returns each with its worker.

    `count_loss` is false if no job can have killed the worker, as after a power cut.
    """
    jobs = await _lock_running(session, Job.worker == worker, Job.id.not_in(still_running))
    return await _release_all(session, jobs, count_loss)


async def _lock_running(session: AsyncSession, *conditions: ColumnElement[bool]) -> Sequence[Job]:
    query = select(Job).where(Job.state == State.RUNNING, *conditions).order_by(Job.id)
    return (await session.scalars(query.with_for_update(key_share=True))).all()


async def _release_all(session: AsyncSession, jobs: Sequence[Job], count_loss: bool = True) -> list[tuple[str, str]]:
    released = [(job.id, job.worker or "") for job in jobs]
    for job in jobs:
        await _release(session, job, count_loss)
    if released:
        queue.wake_dispatcher_on_commit(session)
    return released


async def _release(session: AsyncSession, job: Job, count_loss: bool) -> None:
    """Release a job whose worker was lost: apply its control request, or queue it for another worker.

    A job that has lost too many workers that it shared gets one of its own, so that only a job that kills a worker
    alone on it fails.
    """
    was_alone = job.demand > ""
    has_lost_too_many = count_loss and _count_loss(job) >= get_settings().jobs.max_losses
    if has_lost_too_many and not was_alone:
        job.demand, job.losses = OWN_WORKER, 0
    if job.control == Control.CANCEL:
        values, entry = cancelled_values(), JournalEntry(job.id, "cancelled")
    elif has_lost_too_many and was_alone:
        message = (
            f"Its worker was lost {job.losses} times in a row, with no other job on it, and without a new checkpoint."
        )
        error = {"code": "worker_lost", "message": message}
        values = finished_values(State.FAILED) | {"error": error}
        entry = JournalEntry(job.id, "failed", {"error": error})
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


def _count_loss(job: Job) -> int:
    """Count a loss, unless the job has got further than at the loss before. Returns how many there are in a row.

    If it has got further, it begins at zero: another job, or a person, has killed its worker.
    """
    checkpoint = _digest(job.checkpoint)
    if checkpoint == job.lost_checkpoint:
        job.losses += 1
    else:
        job.lost_checkpoint, job.losses = checkpoint, 0
        job.demand = Resources.model_validate(job.resources).demand
    return job.losses


def _digest(checkpoint: object) -> str | None:
    if checkpoint is None:
        return None
    return hashlib.sha256(json.dumps(checkpoint, sort_keys=True).encode()).hexdigest()
