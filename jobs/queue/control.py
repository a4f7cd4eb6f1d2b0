"""Cancel, pause, resume and retry jobs, together with their children."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import after_commit, now
from jobs import journal
from jobs.journal import JournalEntry
from jobs.queue.dependencies import finish_waiting_jobs
from jobs.queue.errors import END_TEXTS, JobStateConflict, format_end
from jobs.queue.rows import descendants_of, is_paused_or_pausing, lock_jobs
from jobs.queue.wakeup import notify_dispatcher, wake_dispatcher_on_commit
from jobs.registry import Resources
from jobs.states import FINISHED, RETRYABLE, Control, State
from jobs.tables import Job, JobDependency


async def cancel(session: AsyncSession, job: Job) -> None:
    """Cancel a job and all its children: waiting ones at once, running ones as soon as they react."""
    if job.state in FINISHED:
        raise JobStateConflict(f"{job.id} has already {format_end(job)}.")
    affected = [job, *await descendants_of(session, [job.id])]
    await cancel_all(session, affected, {"code": "cancelled", "message": "Cancelled."})


async def cancel_all(session: AsyncSession, jobs: Sequence[Job], error: dict[str, str]) -> None:
    """Cancel these unfinished jobs, whose rows are locked. The waiting ones get this error."""
    waiting = [job for job in jobs if job.state in {State.QUEUED, State.PAUSED}]
    await finish_waiting_jobs(session, waiting, State.CANCELLED, error)
    for job in jobs:
        if job.state == State.RUNNING:
            await _set_control(session, job, Control.CANCEL)


async def pause(session: AsyncSession, job: Job) -> None:
    """Pause a job and all its children: queued ones at once, running ones at their next checkpoint."""
    if job.state in FINISHED:
        raise JobStateConflict(f"{job.id} has already {format_end(job)}.")
    if job.control == Control.CANCEL:
        raise JobStateConflict(f"{job.id} is being cancelled.")
    affected = [job, *await descendants_of(session, [job.id])]
    for member in affected:
        if member.state == State.QUEUED:
            member.state = State.PAUSED
            journal.record(session, [JournalEntry(member.id, "paused")])
        elif member.state == State.RUNNING and member.control != Control.CANCEL:
            await _set_control(session, member, Control.PAUSE)


async def resume(session: AsyncSession, job: Job) -> None:
    """Resume a paused job and all its paused children, from their checkpoints."""
    if not is_paused_or_pausing(job):
        raise JobStateConflict(f"{job.id} is {job.state}, not paused.")
    affected = [job, *await descendants_of(session, [job.id])]
    for member in filter(is_paused_or_pausing, affected):
        if member.state == State.RUNNING:
            await _set_control(session, member, None)
            continue
        member.state = State.QUEUED
        journal.record(session, [JournalEntry(member.id, "queued", {"resumed": True})])
        wake_dispatcher_on_commit(session)


async def retry(session: AsyncSession, job: Job) -> None:
    """Queue a failed or cancelled job again, with a new count of attempts, from its last checkpoint."""
    if job.state not in RETRYABLE:
        raise JobStateConflict(f"{job.id} is {job.state}; only a failed or cancelled job can be retried.")
    for child in await lock_jobs(session, select(Job).where(Job.parent_id == job.id, Job.state.in_(RETRYABLE))):
        await retry(session, child)
    links = select(JobDependency.depends_on_id).where(JobDependency.job_id == job.id)
    unfinished = await lock_jobs(session, select(Job).where(Job.id.in_(links), Job.state != State.SUCCEEDED))
    for dependency in unfinished:
        if dependency.state in RETRYABLE:
            raise JobStateConflict(
                f"{job.id} depends on {dependency.id}, which {END_TEXTS[State(dependency.state)]}: retry that one."
            )
    job.state, job.unfinished_dependencies = State.QUEUED, len(unfinished)
    job.attempt = job.losses = 0
    job.demand = Resources.model_validate(job.resources).demand
    job.error = job.finished_at = job.control = job.phase = None
    job.run_after, job.delayed = now(), False
    journal.record(session, [JournalEntry(job.id, "queued", {"retried": True})])
    wake_dispatcher_on_commit(session)


async def _set_control(session: AsyncSession, job: Job, control: Control | None) -> None:
    """Store a request on a running job's row, and notify its worker, which otherwise sees it at its next heartbeat."""
    if job.control == control:
        return
    job.control = control
    journal.record(session, [JournalEntry(job.id, "control", {"control": control})])
    worker, job_id = job.worker, job.id
    after_commit(session, lambda: notify_dispatcher("control", worker, job_id, control))
