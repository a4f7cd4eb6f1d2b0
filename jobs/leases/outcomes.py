"""Guarded writes of a worker: progress, and how a job ends."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from jobs import journal, queue
from jobs.journal import Entry
from jobs.retry_policy import Failure
from jobs.states import FINISHED, Control, State
from jobs.tables import Job, JobDependency


@dataclass
class Write:
    """What a worker wants to say of one job: columns to set and entries for the journal."""

    job_id: str
    token: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    entries: list[Entry] = field(default_factory=list[Entry])


async def write(session: AsyncSession, writes: Sequence[Write]) -> set[str]:
    """Do all these writes whose tokens still hold; returns the tokens that do not, whose writes changed nothing."""
    held = await session.execute(
        select(Job.id, Job.lease_token, Job.control)
        .where(Job.id.in_([one.job_id for one in writes]), Job.state == State.RUNNING)
        .order_by(Job.id)  # everybody who locks several jobs locks them in this order
        .with_for_update(key_share=True)
    )
    rows_held = {row.lease_token: row for row in held.all()}
    valid = [_as_asked(one, rows_held[one.token].control) for one in writes if one.token in rows_held]
    moment = now()
    for columns, rows in _by_columns(valid).items():
        if columns:
            await session.execute(update(Job), [row | {"updated_at": moment} for row in rows])
    journal.record(session, [entry for one in valid for entry in one.entries])
    if any(one.values.get("state") == State.QUEUED for one in valid):
        queue.wake_dispatcher_after(session)
    ended = {one.job_id: State(one.values["state"]) for one in valid if one.values.get("state") in FINISHED}
    if ended:
        await queue.release_dependents(session, ended)
    return {one.token for one in writes} - {one.token for one in valid}


def succeeded(result: object) -> dict[str, Any]:
    return finished_values(State.SUCCEEDED) | {"result": result, "error": None, "progress": 100.0, "phase": None}


def cancelled() -> dict[str, Any]:
    return finished_values(State.CANCELLED) | {"error": {"code": "cancelled", "message": "Cancelled."}}


def paused() -> dict[str, Any]:
    return released_values(State.PAUSED)


def parked() -> dict[str, Any]:
    return released_values(State.QUEUED) | {"phase": "waiting for its children"}


def failed(failure: Failure, attempt: int, max_attempts: int) -> dict[str, Any]:
    """Another attempt when there is one left and it makes sense, else the end."""
    if failure.retry_in is None or attempt >= max_attempts:
        return finished_values(State.FAILED) | {"error": failure.as_error()}
    later = now() + timedelta(seconds=failure.retry_in)
    return released_values(State.QUEUED) | {
        "error": failure.as_error(),
        "attempt": attempt + 1,
        "run_after": later,
        "delayed": True,
    }


async def park(session: AsyncSession, job_id: str, token: str, children: Iterable[str]) -> bool:
    """Put a running job back into the queue until its children have finished."""
    job = await session.scalar(select(Job).where(Job.id == job_id).with_for_update(key_share=True))
    if job is None or job.lease_token != token or job.state != State.RUNNING:
        return False
    unfinished = 0
    for child in await session.scalars(select(Job).where(Job.id.in_(set(children))).with_for_update(read=True)):
        await session.merge(JobDependency(job_id=job_id, depends_on_id=child.id))
        unfinished += child.state not in FINISHED
    parking = _as_asked(Write(job_id, token, parked(), [Entry(job_id, "queued", {"parked": True})]), job.control)
    for column, value in parking.values.items():
        setattr(job, column, value)
    job.unfinished_dependencies = unfinished
    await session.flush()
    journal.record(session, parking.entries)
    queue.wake_dispatcher_after(session)
    if job.state in FINISHED:
        await queue.release_dependents(session, {job.id: State(job.state)})
    return True


def _as_asked(one: Write, control: str | None) -> Write:
    """A job that would go on, or hold, does what was asked of it meanwhile."""
    state = one.values.get("state")
    if state not in {State.QUEUED, State.PAUSED}:
        return one
    wishes: dict[str | None, State] = {Control.PAUSE: State.PAUSED, Control.CANCEL: State.CANCELLED}
    asked = wishes.get(control, State.QUEUED)
    if asked == state:
        return one
    values = cancelled() if asked == State.CANCELLED else one.values | {"state": asked}
    entries = [entry for entry in one.entries if entry.type not in set(State)]
    return Write(one.job_id, one.token, values, [*entries, Entry(one.job_id, asked)])


def released_values(state: State) -> dict[str, Any]:
    return {"state": state, "worker": None, "lease_token": None, "lease_expires_at": None, "control": None}


def finished_values(state: State) -> dict[str, Any]:
    return released_values(state) | {"finished_at": now()}


def _by_columns(writes: Iterable[Write]) -> Mapping[frozenset[str], list[dict[str, Any]]]:
    """Rows that set the same columns go to the database as one statement."""
    groups: dict[frozenset[str], list[dict[str, Any]]] = {}
    for one in writes:
        groups.setdefault(frozenset(one.values), []).append({"id": one.job_id, **one.values})
    return groups
