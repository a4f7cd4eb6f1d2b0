"""The guarded writes of workers, and the values that each outcome of a job sets."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from jobs import journal, queue
from jobs.journal import JournalEntry
from jobs.registry import LIGHT
from jobs.retry_policy import Failure
from jobs.states import FINISHED, Control, State
from jobs.tables import Job, JobDependency


@dataclass
class GuardedWrite:
    """What a worker writes about one job: columns to set, and entries for the journal."""

    job_id: str
    token: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    entries: list[JournalEntry] = field(default_factory=list[JournalEntry])


async def apply_writes(session: AsyncSession, writes: Sequence[GuardedWrite]) -> set[str]:
    """Apply the writes whose tokens are valid. Returns the other tokens, whose writes changed nothing."""
    locked = await session.execute(
        select(Job.id, Job.lease_token, Job.control)
        .where(Job.id.in_([write.job_id for write in writes]), Job.state == State.RUNNING)
        .order_by(Job.id)  # all code locks jobs in this order, to prevent deadlocks
        .with_for_update(key_share=True)
    )
    rows_by_token = {row.lease_token: row for row in locked.all()}
    valid = [
        _apply_control(write, rows_by_token[write.token].control) for write in writes if write.token in rows_by_token
    ]
    moment = now()
    for columns, rows in _group_by_columns(valid).items():
        if columns:
            await session.execute(update(Job), [row | {"updated_at": moment} for row in rows])
    journal.record(session, [entry for write in valid for entry in write.entries])
    if any(write.values.get("state") == State.QUEUED for write in valid):
        queue.wake_dispatcher_on_commit(session)
    finished_states = {
        write.job_id: State(write.values["state"]) for write in valid if write.values.get("state") in FINISHED
    }
    if finished_states:
        await queue.release_dependents(session, finished_states)
    return {write.token for write in writes} - {write.token for write in valid}


def succeeded_values(result: object) -> dict[str, Any]:
    return finished_values(State.SUCCEEDED) | {"result": result, "error": None, "progress": 100.0, "phase": None}


def cancelled_values() -> dict[str, Any]:
    return finished_values(State.CANCELLED) | {"error": {"code": "cancelled", "message": "Cancelled."}}


def paused_values() -> dict[str, Any]:
    return released_values(State.PAUSED)


def cleared_values() -> dict[str, Any]:
    """Return the values of a suspect that has got further: it shares a worker again, so that others can be tried."""
    return released_values(State.QUEUED) | {"demand": LIGHT.demand, "losses": 0}


def parked_values() -> dict[str, Any]:
    return released_values(State.QUEUED) | {"phase": "waiting for its children"}


def failure_values(failure: Failure, attempt: int, max_attempts: int) -> dict[str, Any]:
    """Return the values for another attempt, if one is left and makes sense, else those of a failed job."""
    if failure.retry_in is None or attempt >= max_attempts:
        return finished_values(State.FAILED) | {"error": failure.to_error()}
    later = now() + timedelta(seconds=failure.retry_in)
    return released_values(State.QUEUED) | {
        "error": failure.to_error(),
        "attempt": attempt + 1,
        "run_after": later,
        "delayed": True,
    }


async def park(session: AsyncSession, job_id: str, token: str, children: Iterable[str]) -> bool:
    """Put a running job back into the queue, to wait for its children. False: its lease is lost."""
    job = await session.scalar(select(Job).where(Job.id == job_id).with_for_update(key_share=True))
    if job is None or job.lease_token != token or job.state != State.RUNNING:
        return False
    unfinished = 0
    for child in await session.scalars(select(Job).where(Job.id.in_(set(children))).with_for_update(read=True)):
        await session.merge(JobDependency(job_id=job_id, depends_on_id=child.id))
        unfinished += child.state not in FINISHED
    park_write = _apply_control(
        GuardedWrite(job_id, token, parked_values(), [JournalEntry(job_id, "queued", {"parked": True})]), job.control
    )
    for column, value in park_write.values.items():
        setattr(job, column, value)
    job.unfinished_dependencies = unfinished
    await session.flush()
    journal.record(session, park_write.entries)
    queue.wake_dispatcher_on_commit(session)
    if job.state in FINISHED:
        await queue.release_dependents(session, {job.id: State(job.state)})
    return True


def _apply_control(write: GuardedWrite, control: str | None) -> GuardedWrite:
    """Apply a control request that has arrived meanwhile, if the write queues or pauses the job."""
    state = write.values.get("state")
    if state not in {State.QUEUED, State.PAUSED}:
        return write
    target_states: dict[str | None, State] = {Control.PAUSE: State.PAUSED, Control.CANCEL: State.CANCELLED}
    target = target_states.get(control, State.QUEUED)
    if target == state:
        return write
    values = cancelled_values() if target == State.CANCELLED else write.values | {"state": target}
    entries = [entry for entry in write.entries if entry.type not in set(State)]
    return GuardedWrite(write.job_id, write.token, values, [*entries, JournalEntry(write.job_id, target)])


def released_values(state: State) -> dict[str, Any]:
    return {"state": state, "worker": None, "lease_token": None, "heartbeats": 0, "control": None}


def finished_values(state: State) -> dict[str, Any]:
    return released_values(state) | {"finished_at": now()}


def _group_by_columns(writes: Iterable[GuardedWrite]) -> Mapping[frozenset[str], list[dict[str, Any]]]:
    """Group rows that set the same columns, because they are written with one statement."""
    groups: dict[frozenset[str], list[dict[str, Any]]] = {}
    for write in writes:
        groups.setdefault(frozenset(write.values), []).append({"id": write.job_id, **write.values})
    return groups
