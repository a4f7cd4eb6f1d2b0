"""Who runs what: leadership of the dispatcher, leases of the workers, and the guarded writes that they allow.

A claim gives a job a fresh token and a time until which it is valid; every later write of the worker must show that
token. A worker that was given up for dead may wake up and go on working, but nothing that it says is heard any more:
execution is at least once, the outcome exactly once.
"""

import math
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

from sqlalchemy import func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from cluster.errors import ForgearrError
from cluster.settings import get_settings
from jobs import journal, queue
from jobs.journal import Entry
from jobs.retries import Failure
from jobs.states import FINISHED, Control, State
from jobs.tables import Job, JobDependency, Leadership

ALONE = "a worker of its own"
"""The demand of a light job that may have killed the workers that it shared with others."""


class LeadershipLost(ForgearrError):
    """Another dispatcher has taken over this database."""

    code = "LEADERSHIP_LOST"


@dataclass(frozen=True)
class Claim:
    """A job that was given to a worker, with all that the worker needs to know of it."""

    job_id: str
    token: str
    kind: str
    entrypoint: str
    spec: dict[str, Any]
    checkpoint: Any
    attempt: int
    max_attempts: int
    time_limit: float | None
    stall_limit: float | None
    resources: dict[str, Any]
    worker: str
    owner_id: str | None  # None: this machine's own


@dataclass
class Write:
    """What a worker wants to say of one job: columns to set and entries for the journal."""

    job_id: str
    token: str
    values: dict[str, Any] = field(default_factory=dict[str, Any])
    entries: list[Entry] = field(default_factory=list[Entry])


class Capacity(Protocol):
    """Where there is room. The dispatcher knows; the queue only asks."""

    def room(self, *, heavy: bool) -> int:
        """About how many more light or heavy jobs could start now."""
        ...

    def take(self, job: Job) -> str | None:
        """The worker that this job goes to, whose room is then occupied; None when it does not fit anywhere now."""
        ...

    def shortage(self, demand: str) -> str:
        """What a job of this demand waits for when it does not fit."""
        ...


async def take_leadership(session: AsyncSession, holder: str) -> str | None:
    """The token of a new leadership, or None while another holder's is valid. The same holder may replace itself."""
    token = secrets.token_hex(8)
    leader = await session.get(Leadership, 1, with_for_update=True)
    if leader is None:
        session.add(Leadership(id=1, holder=holder, token=token, expires_at=_expiry(), waiting={}))
        return token
    if leader.holder != holder and leader.expires_at > now():
        return None
    leader.holder, leader.token, leader.expires_at = holder, token, _expiry()
    return token


async def keep_leadership(session: AsyncSession, token: str) -> None:
    leader = await _require_leadership(session, token)
    leader.expires_at = _expiry()


async def claim(session: AsyncSession, token: str, capacity: Capacity) -> list[Claim]:
    """Give queued jobs to workers, by priority, then age, as far as there is room.

    A job that does not fit lets smaller ones pass: its demand, or its kind when that is at its limit, is set aside
    for the rest of the look, so that ten thousand of its like cost no more than one. Light and heavy jobs do not
    compete: the former share warm workers, the latter have an actor each.
    """
    leader = await _require_leadership(session, token)
    due = (Job.state == State.QUEUED, Job.delayed, Job.run_after <= now())
    await session.execute(update(Job).where(*due).values(delayed=False, updated_at=Job.updated_at))
    kinds = await _room_of_kinds(session)
    waiting = {} if capacity.room(heavy=True) else _still_waiting(leader.waiting, kinds)
    chosen: list[tuple[Job, str]] = []
    for heavy in (False, True):
        full_demands: set[str] = set()
        while room := capacity.room(heavy=heavy):
            full_kinds = [kind for kind, left in kinds.items() if left <= 0]
            taken = [job.id for job, _ in chosen]
            page = await _runnable(session, heavy, full_demands, full_kinds, taken, room)
            for job in page:
                if job.concurrency is not None and kinds.setdefault(job.kind, job.concurrency) <= 0:
                    waiting[f"kind {job.kind}"] = f"one of the {job.concurrency} running '{job.kind}' jobs to finish"
                elif job.demand in full_demands or (worker := capacity.take(job)) is None:
                    full_demands.add(job.demand)
                    waiting[f"demand {job.demand}"] = capacity.shortage(job.demand)
                else:
                    chosen.append((job, worker))
                    if job.concurrency is not None:
                        kinds[job.kind] -= 1
            if len(page) < room:
                break
    if not capacity.room(heavy=False):
        waiting["demand "] = capacity.shortage("")
    if leader.waiting != waiting:
        leader.waiting = waiting
    return await _lease(session, chosen)


async def outlook(session: AsyncSession) -> tuple[float, bool]:
    """Seconds until a delayed job may run, and whether any heavy job is queued."""
    delayed = await session.scalar(
        select(Job.run_after).where(Job.state == State.QUEUED, Job.delayed).order_by(Job.run_after).limit(1)
    )
    heavy = await session.scalar(
        select(Job.id)
        .where(Job.state == State.QUEUED, Job.unfinished_dependencies == 0, Job.demand > "", ~Job.delayed)
        .limit(1)
    )
    return math.inf if delayed is None else max(0.0, (delayed - now()).total_seconds()), heavy is not None


async def held_by_workers(session: AsyncSession) -> dict[str, list[Job]]:
    """The running jobs of each worker."""
    held: dict[str, list[Job]] = {}
    for job in await session.scalars(select(Job).where(Job.state == State.RUNNING)):
        held.setdefault(job.worker or "", []).append(job)
    return held


async def renew(session: AsyncSession, tokens: Collection[str]) -> dict[str, str | None]:
    """A heartbeat: renew these leases. Returns those that still hold, with what is asked of their jobs."""
    held = select(Job.id, Job.lease_token, Job.control).where(
        Job.lease_token.in_(tokens), Job.state == State.RUNNING, Job.worker.is_not(None)
    )
    rows = (await session.execute(held.order_by(Job.id).with_for_update(key_share=True))).all()
    extended = update(Job).where(Job.id.in_([row.id for row in rows])).values(lease_expires_at=_expiry())
    # A heartbeat is no news of the job.
    await session.execute(extended.values(updated_at=Job.updated_at).execution_options(synchronize_session=False))
    return {row.lease_token: row.control for row in rows}


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
    return _ending(State.SUCCEEDED) | {"result": result, "error": None, "progress": 100.0, "phase": None}


def cancelled() -> dict[str, Any]:
    return _ending(State.CANCELLED) | {"error": {"code": "cancelled", "message": "Cancelled."}}


def paused() -> dict[str, Any]:
    return _unheld(State.PAUSED)


def parked() -> dict[str, Any]:
    return _unheld(State.QUEUED) | {"phase": "waiting for its children"}


def failed(failure: Failure, attempt: int, max_attempts: int) -> dict[str, Any]:
    """Another attempt when there is one left and it makes sense, else the end."""
    if failure.retry_in is None or attempt >= max_attempts:
        return _ending(State.FAILED) | {"error": failure.as_error()}
    later = now() + timedelta(seconds=failure.retry_in)
    return _unheld(State.QUEUED) | {
        "error": failure.as_error(),
        "attempt": attempt + 1,
        "run_after": later,
        "delayed": True,
    }


async def release_lost(
    session: AsyncSession, *, worker: str | None = None, but: Collection[str] = (), suspect: bool = True
) -> list[tuple[str, str]]:
    """Take back the jobs of a dead worker (but those), or all whose lease has run out; returns each with its worker.

    A worker that dies may have been killed by one of its jobs. The suspects go on with one loss more, the last time on
    a worker of their own, so that only the one that dies alone fails. After a power cut there is nothing to suspect.
    """
    lost = Job.worker == worker if worker else Job.lease_expires_at < now()
    rows = await session.scalars(
        select(Job)
        .where(Job.state == State.RUNNING, lost, Job.id.not_in(but))
        .order_by(Job.id)
        .with_for_update(key_share=True)
    )
    released = [(job, job.worker or "") for job in rows.all()]
    for job, _ in released:
        await _release(session, job, suspect)
    if released:
        queue.wake_dispatcher_after(session)
    return [(job.id, name) for job, name in released]


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


def _expiry() -> Any:
    return now() + timedelta(seconds=get_settings().jobs.lease_seconds)


def _unheld(state: State) -> dict[str, Any]:
    return {"state": state, "worker": None, "lease_token": None, "lease_expires_at": None, "control": None}


def _ending(state: State) -> dict[str, Any]:
    return _unheld(state) | {"finished_at": now()}


async def _require_leadership(session: AsyncSession, token: str) -> Leadership:
    leader = await session.get(Leadership, 1)
    if leader is None or leader.token != token:
        raise LeadershipLost()
    return leader


async def _room_of_kinds(session: AsyncSession) -> dict[str, int]:
    """How many more may run of each kind that has a limit and runs now."""
    rows = await session.execute(
        select(Job.kind, (func.min(Job.concurrency) - func.count()).label("room"))
        .where(Job.state == State.RUNNING, Job.concurrency.is_not(None))
        .group_by(Job.kind)
    )
    return {row.kind: row.room for row in rows.all()}


def _still_waiting(waiting: Mapping[str, str], kinds: Mapping[str, int]) -> dict[str, str]:
    """What kept heavy jobs waiting still does when they are not looked at this time, unless their kind has room."""
    full = {f"kind {kind}" for kind, left in kinds.items() if left <= 0}
    return {key: why for key, why in waiting.items() if key in full or (key.startswith("demand") and key != "demand ")}


async def _runnable(
    session: AsyncSession,
    heavy: bool,
    full_demands: Iterable[str],
    full_kinds: Iterable[str],
    taken: Iterable[str],
    limit: int,
) -> Sequence[Job]:
    query = (
        select(Job)
        .where(Job.state == State.QUEUED, Job.unfinished_dependencies == 0, ~Job.delayed)
        .where(Job.demand > "" if heavy else Job.demand == "")
        .where(Job.demand.not_in(full_demands), Job.kind.not_in(full_kinds), Job.id.not_in(taken))
        .order_by(Job.priority.desc(), Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    )
    return (await session.scalars(query)).all()


async def _lease(session: AsyncSession, chosen: Sequence[tuple[Job, str]]) -> list[Claim]:
    if not chosen:
        return []
    moment, expiry = now(), _expiry()
    claims = [_claim(job, worker) for job, worker in chosen]
    started = {job.id: job.started_at or moment for job, _ in chosen}
    rows = [
        {
            "id": one.job_id,
            "state": State.RUNNING,
            "worker": one.worker,
            "lease_token": one.token,
            "lease_expires_at": expiry,
            "attempt": one.attempt,
            "started_at": started[one.job_id],
            "phase": None,
            "updated_at": moment,
        }
        for one in claims
    ]
    await session.execute(update(Job), rows)
    entries = [Entry(one.job_id, "running", {"attempt": one.attempt, "worker": one.worker}, moment) for one in claims]
    journal.record(session, entries)
    return claims


def _claim(job: Job, worker: str) -> Claim:
    return Claim(
        job_id=job.id,
        token=secrets.token_hex(8),
        kind=job.kind,
        entrypoint=job.entrypoint,
        spec=job.spec,
        checkpoint=job.checkpoint,
        attempt=max(job.attempt, 1),
        max_attempts=job.max_attempts,
        time_limit=job.time_limit,
        stall_limit=job.stall_limit,
        resources=job.resources,
        worker=worker,
        owner_id=job.owner_id,
    )


def _by_columns(writes: Iterable[Write]) -> Mapping[frozenset[str], list[dict[str, Any]]]:
    """Rows that set the same columns go to the database as one statement."""
    groups: dict[frozenset[str], list[dict[str, Any]]] = {}
    for one in writes:
        groups.setdefault(frozenset(one.values), []).append({"id": one.job_id, **one.values})
    return groups


async def _release(session: AsyncSession, job: Job, suspect: bool) -> None:
    """What becomes of a job whose worker was lost: what it was asked meanwhile, or another worker."""
    job.losses += suspect
    if job.losses >= get_settings().jobs.max_losses - 1 and not job.demand:
        job.demand = ALONE
    if job.control == Control.CANCEL:
        values, entry = cancelled(), Entry(job.id, "cancelled")
    elif job.losses >= get_settings().jobs.max_losses:
        message = f"Its worker was lost {job.losses} times, the last time with no other job on it."
        error = {"code": "worker_lost", "message": message}
        values, entry = _ending(State.FAILED) | {"error": error}, Entry(job.id, "failed", {"error": error})
    elif job.control == Control.PAUSE:
        values, entry = paused(), Entry(job.id, "paused")
    else:
        values, entry = _unheld(State.QUEUED), Entry(job.id, "queued", {"lost_worker": job.worker})
    for column, value in values.items():
        setattr(job, column, value)
    await session.flush()
    journal.record(session, [entry])
    if job.state in FINISHED:
        await queue.release_dependents(session, {job.id: State(job.state)})
