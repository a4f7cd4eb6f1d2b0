"""The queue as everybody but its workers sees it: put jobs in, look at them, and ask things of them.

Every function takes the caller's session, so that a job is written in the transaction of whatever asked for it, and a
rolled-back request leaves no job behind.
"""

import hashlib
import itertools
import json
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import Select, delete, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import actors
from cluster.db import after_commit, now, one_at_a_time
from cluster.errors import Conflict, Forbidden, ForgearrError, NotFound, Unavailable, UnprocessableRequest
from cluster.settings import get_settings
from cluster.times import GivenTime
from jobs import journal
from jobs.journal import Entry
from jobs.registry import Kind, Resources, find_kind
from jobs.states import FINISHED, RETRYABLE, Control, State
from jobs.tables import IdempotencyKey, Job, JobDependency

DISPATCHER = "dispatcher"
MAX_DEPENDENCIES = 1000


class JobNotFound(NotFound):
    """There is no such job."""

    code = "JOB_NOT_FOUND"


class JobStateConflict(Conflict):
    """The job is in a state that does not allow this."""

    code = "JOB_STATE_CONFLICT"


class IdempotencyConflict(Conflict):
    """This Idempotency-Key was used for another request."""

    code = "IDEMPOTENCY_KEY_REUSED"


class UnknownDependency(UnprocessableRequest):
    """A job named in depends_on does not exist."""

    code = "UNKNOWN_DEPENDENCY"


class ChildFailed(ForgearrError):
    """A child of this job did not succeed."""

    code = "CHILD_FAILED"

    def __init__(self, child: Job) -> None:
        reason = (child.error or {}).get("message", "")
        super().__init__(f"Its child '{child.child_name}' ({child.id}) {_PAST[State(child.state)]}: {reason}")


class Owner(BaseModel):
    """In whose name a job runs. Without an id it is this machine's own."""

    model_config = ConfigDict(frozen=True)

    id: str | None = None
    name: str = "local"
    is_admin: bool = True


LOCAL = Owner()


class JobRequest(BaseModel):
    """A job that somebody wants done."""

    model_config = ConfigDict(extra="forbid", strict=True)

    kind: str = Field(max_length=100, examples=["probe"], description="GET /api/v1/jobs/kinds lists them.")
    spec: dict[str, Any] = Field(default_factory=dict, description="What to do, as this kind defines it.")
    priority: int = Field(default=0, ge=-1000, le=1000, description="Higher goes first.")
    run_after: GivenTime | None = Field(default=None, description="Not before this time.")
    depends_on: list[str] = Field(
        default_factory=list, max_length=MAX_DEPENDENCIES, description="Jobs that must succeed first."
    )
    max_attempts: int | None = Field(default=None, ge=1, le=100, description="Null: as the kind says.")
    resources: Resources | None = Field(default=None, description="Null: as the kind says.")
    tracked: bool | None = Field(default=None, description="Whether it is a run in MLflow. Null: as the kind says.")


async def enqueue(
    session: AsyncSession,
    request: JobRequest,
    owner: Owner = LOCAL,
    *,
    idempotency_key: str | None = None,
    unless_queued: bool = False,
) -> Job:
    """Put one job into the queue, or find the one that the same request has made before.

    With `unless_queued`, one that waits to do the same will do, whoever asked for it.
    """
    if idempotency_key and (known := await _find_by_key(session, request, owner, idempotency_key)):
        return known
    kind = find_kind(request.kind)
    spec = kind.check(request.spec)
    if not owner.is_admin and kind.needs_admin(spec):
        raise Forbidden(f"Only an administrator may run '{kind.name}'{'' if kind.admin_only is True else ' so'}.")
    job = await _find_queued(session, kind, spec) if unless_queued else None
    if job is None:
        (job,) = await _insert(session, [(request, kind, spec)], owner)
        await _link_dependencies(session, job, request.depends_on, owner)
    if idempotency_key:
        session.add(_remember(job, request, owner, idempotency_key))
        await session.flush()
    return job


async def enqueue_many(session: AsyncSession, requests: Sequence[JobRequest], owner: Owner = LOCAL) -> list[Job]:
    """Put many jobs without dependencies into the queue in one go."""
    if any(request.depends_on for request in requests):
        raise UnprocessableRequest("Jobs that are queued together cannot have dependencies; queue them one by one.")
    wanted = [(request, find_kind(request.kind)) for request in requests]
    return await _insert(session, [(request, kind, kind.check(request.spec)) for request, kind in wanted], owner)


async def enqueue_child(
    session: AsyncSession,
    parent: Job,
    name: str,
    kind: str,
    spec: dict[str, Any],
    resources: Resources | None = None,
) -> Job:
    """The child of this name: found when the parent asks again, after a crash or a park, else queued now."""
    known = await session.scalar(select(Job).where(Job.parent_id == parent.id, Job.child_name == name))
    if known is not None:
        return known
    request = JobRequest(kind=kind, spec=spec, priority=parent.priority, resources=resources)
    child = await enqueue(session, request, Owner(id=parent.owner_id, name=parent.created_by))
    child.parent_id, child.child_name = parent.id, name
    if parent.control == Control.PAUSE:  # asked of the whole family, a moment before this one was born
        await pause(session, child)
    await session.flush()
    return child


async def get(session: AsyncSession, job_id: str, owner: Owner = LOCAL, *, lock: bool = False) -> Job:
    """The job, if this owner may see it: anybody else is told that it does not exist."""
    query = select(Job).where(Job.id == job_id)
    job = await session.scalar(query.with_for_update(key_share=True) if lock else query)
    if job is None or not (owner.is_admin or job.owner_id == owner.id):
        raise JobNotFound(f"There is no job '{job_id}'.")
    return job


async def cancel(session: AsyncSession, job: Job) -> None:
    """Cancel a job and all its children: at once when it waits, as soon as it listens when it runs."""
    if job.state in FINISHED:
        raise JobStateConflict(f"{job.id} has already {_ended(job)}.")
    family = [job, *await _descendants(session, [job.id])]
    waiting = [member for member in family if member.state in {State.QUEUED, State.PAUSED}]
    await finish_waiting(session, waiting, State.CANCELLED, {"code": "cancelled", "message": "Cancelled."})
    for member in family:
        if member.state == State.RUNNING:
            await _ask(session, member, Control.CANCEL)


async def pause(session: AsyncSession, job: Job) -> None:
    """Hold a job and all its children: at once when they are queued, at their next checkpoint when they run."""
    if job.state in FINISHED:
        raise JobStateConflict(f"{job.id} has already {_ended(job)}.")
    if job.control == Control.CANCEL:
        raise JobStateConflict(f"{job.id} is being cancelled.")
    family = [job, *await _descendants(session, [job.id])]
    for member in family:
        if member.state == State.QUEUED:
            member.state = State.PAUSED
            journal.record(session, [Entry(member.id, "paused")])
        elif member.state == State.RUNNING and member.control != Control.CANCEL:
            await _ask(session, member, Control.PAUSE)


async def resume(session: AsyncSession, job: Job) -> None:
    """Let a paused job, and all its children that are paused, go on from their checkpoints."""
    if not _is_held(job):
        raise JobStateConflict(f"{job.id} is {job.state}, not paused.")
    family = [job, *await _descendants(session, [job.id])]
    for member in filter(_is_held, family):
        if member.state == State.RUNNING:
            await _ask(session, member, None)
            continue
        member.state = State.QUEUED
        journal.record(session, [Entry(member.id, "queued", {"resumed": True})])
        wake_dispatcher_after(session)


async def retry(session: AsyncSession, job: Job) -> None:
    """Give a failed or cancelled job a fresh set of attempts, from its last checkpoint."""
    if job.state not in RETRYABLE:
        raise JobStateConflict(f"{job.id} is {job.state}; only a failed or cancelled job can be retried.")
    for child in await _locked(session, select(Job).where(Job.parent_id == job.id, Job.state.in_(RETRYABLE))):
        await retry(session, child)
    links = select(JobDependency.depends_on_id).where(JobDependency.job_id == job.id)
    unfinished = await _locked(session, select(Job).where(Job.id.in_(links), Job.state != State.SUCCEEDED))
    for dependency in unfinished:
        if dependency.state in RETRYABLE:
            raise JobStateConflict(
                f"{job.id} depends on {dependency.id}, which {_PAST[State(dependency.state)]}: retry that."
            )
    job.state, job.unfinished_dependencies = State.QUEUED, len(unfinished)
    job.attempt = job.losses = 0
    job.demand = Resources.model_validate(job.resources).demand
    job.error = job.finished_at = job.control = job.phase = None
    job.run_after, job.delayed = now(), False
    journal.record(session, [Entry(job.id, "queued", {"retried": True})])
    wake_dispatcher_after(session)


async def finish_waiting(session: AsyncSession, waiting: Sequence[Job], state: State, error: dict[str, Any]) -> None:
    """End jobs that no worker holds, and with them whatever depends on them."""
    for job in waiting:
        job.state, job.error, job.finished_at, job.control = state, error, now(), None
    journal.record(session, [Entry(job.id, state, {"error": error}) for job in waiting])
    await release_dependents(session, {job.id: state for job in waiting})


async def release_dependents(session: AsyncSession, finished: dict[str, State]) -> None:
    """Tell the jobs that wait for these: one dependency less, or a failure to pass on."""
    links = await session.execute(
        select(JobDependency.job_id, JobDependency.depends_on_id).where(JobDependency.depends_on_id.in_(finished))
    )
    doomed: dict[str, str] = {}
    for job_id, dependency_id in links.all():
        if finished[dependency_id] != State.SUCCEEDED:
            doomed[job_id] = dependency_id
            continue
        await session.execute(
            update(Job)
            .where(Job.id == job_id, Job.unfinished_dependencies > 0)
            .values(unfinished_dependencies=Job.unfinished_dependencies - 1)
        )
        wake_dispatcher_after(session)
    if not doomed:
        return
    waiting = select(Job).where(Job.id.in_(doomed), Job.state.in_([State.QUEUED, State.PAUSED]))
    for dependent in await _locked(session, waiting):
        cause = await session.get_one(Job, doomed[dependent.id], populate_existing=True)
        error = {
            "code": "dependency_failed",
            "message": f"{cause.id}, which this job depends on, {_PAST[finished[cause.id]]}.",
        }
        if cause.parent_id == dependent.id:
            error = {"code": ChildFailed.code.lower(), "message": ChildFailed(cause).message}
        await finish_waiting(session, [dependent], State.FAILED, error)


def stillborn(request: JobRequest, owner: Owner, error: dict[str, Any]) -> Job:
    """A job that could not even be queued, kept so that somebody sees why."""
    moment = now()
    job = _job(request, Kind(request.kind, "", BaseModel, ""), request.spec, owner, moment)
    job.state, job.error, job.finished_at = State.FAILED, error, moment
    return job


def wake_dispatcher_after(session: AsyncSession) -> None:
    """When this transaction has committed, tell the dispatcher that there may be something to do."""
    if wake_dispatcher not in session.info.get("after_commit", []):
        after_commit(session, wake_dispatcher)


def wake_dispatcher() -> None:
    _tell_dispatcher("wake")


def new_job_id(moment: datetime) -> str:
    """job_YYYYMMDD_HHMMSS_xxxx. Four letters are few for a busy second: each process counts up from a random start."""
    suffix = _base36(next(_suffixes) % 36**4)
    return f"job_{moment:%Y%m%d_%H%M%S}_{suffix:0>4}"


_suffixes = itertools.count(secrets.randbelow(36**4))
_PAST = {State.SUCCEEDED: "succeeded", State.FAILED: "failed", State.CANCELLED: "was cancelled"}


def _ended(job: Job) -> str:
    return {State.CANCELLED: "been cancelled"}.get(State(job.state), job.state)


async def _insert(
    session: AsyncSession, wanted: Sequence[tuple[JobRequest, Kind, dict[str, Any]]], owner: Owner
) -> list[Job]:
    """Queue these; their specs have been checked."""
    moment = now()
    jobs = [_job(request, kind, spec, owner, moment) for request, kind, spec in wanted]
    session.add_all(jobs)
    await session.flush()
    journal.record(session, [Entry(job.id, "queued", {"kind": job.kind}, moment) for job in jobs])
    wake_dispatcher_after(session)
    return jobs


def _job(request: JobRequest, kind: Kind, spec: dict[str, Any], owner: Owner, moment: datetime) -> Job:
    resources = request.resources or kind.resources_for(spec)
    return Job(
        id=new_job_id(moment),
        kind=kind.name,
        entrypoint=kind.entrypoint,
        spec=spec,
        state=State.QUEUED,
        priority=request.priority,
        run_after=request.run_after or moment,
        delayed=request.run_after is not None and request.run_after > moment,
        resources=resources.model_dump(),
        demand=resources.demand,
        concurrency=kind.concurrency,
        time_limit=kind.time_limit,
        stall_limit=kind.stall_limit,
        max_attempts=request.max_attempts or kind.max_attempts,
        tracked=kind.tracked if request.tracked is None else request.tracked,
        owner_id=owner.id,
        created_by=owner.name,
        created_at=moment,
        updated_at=moment,
    )


async def _link_dependencies(session: AsyncSession, job: Job, wanted: Sequence[str], owner: Owner) -> None:
    if not wanted:
        return
    # Locked, so that none of them finishes between this look and our commit.
    found = await session.scalars(select(Job).where(Job.id.in_(set(wanted))).with_for_update(read=True))
    known = {other.id: other for other in found if owner.is_admin or other.owner_id == owner.id}
    for dependency_id in dict.fromkeys(wanted):
        if dependency_id not in known:
            raise UnknownDependency(f"There is no job '{dependency_id}' to depend on.")
        session.add(JobDependency(job_id=job.id, depends_on_id=dependency_id))
    await session.flush()
    states = {other.id: State(other.state) for other in known.values()}
    job.unfinished_dependencies = sum(state != State.SUCCEEDED for state in states.values())
    await session.flush()
    lost = {key: state for key, state in states.items() if state in RETRYABLE}
    if lost:
        await release_dependents(session, lost)


async def _find_by_key(session: AsyncSession, request: JobRequest, owner: Owner, key: str) -> Job | None:
    await one_at_a_time(session, f"idempotency {owner.id} {key}")
    known = await session.get(IdempotencyKey, (owner.id or owner.name, key))
    if known is None:
        return None
    if known.expires_at <= now():
        await session.execute(
            delete(IdempotencyKey).where(IdempotencyKey.owner == known.owner, IdempotencyKey.key == key)
        )
        session.expunge(known)
        return None
    if known.request_hash != _request_hash(request):
        raise IdempotencyConflict(f"The idempotency key '{key}' was used for another request ({known.job_id}).")
    return await session.get_one(Job, known.job_id)


async def _find_queued(session: AsyncSession, kind: Kind, spec: dict[str, Any]) -> Job | None:
    await one_at_a_time(session, f"queued {kind.name}")
    # Locked, so that it waits until we have said our word.
    waiting = await _locked(session, select(Job).where(Job.kind == kind.name, Job.state == State.QUEUED))
    return next((job for job in waiting if job.spec == spec), None)


def _remember(job: Job, request: JobRequest, owner: Owner, key: str) -> IdempotencyKey:
    return IdempotencyKey(
        owner=owner.id or owner.name,
        key=key,
        request_hash=_request_hash(request),
        job_id=job.id,
        expires_at=now() + timedelta(hours=get_settings().jobs.idempotency_hours),
    )


def _request_hash(request: JobRequest) -> str:
    return hashlib.sha256(json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()).hexdigest()


async def _locked(session: AsyncSession, wanted: Select[Job]) -> list[Job]:
    """These jobs as they are now, locked in the order that everybody locks them in, so that they stay so."""
    ordered = wanted.order_by(Job.id).with_for_update(key_share=True).execution_options(populate_existing=True)
    return list(await session.scalars(ordered))


async def _descendants(session: AsyncSession, parents: Sequence[str]) -> list[Job]:
    found: list[Job] = []
    while parents:
        children = await _locked(session, select(Job).where(Job.parent_id.in_(parents), Job.state.not_in(FINISHED)))
        found += children
        parents = [child.id for child in children]
    return found


def _is_held(job: Job) -> bool:
    """It is paused, or will be at its next checkpoint."""
    return job.state == State.PAUSED or (job.state == State.RUNNING and job.control == Control.PAUSE)


async def _ask(session: AsyncSession, job: Job, control: Control | None) -> None:
    """Leave a wish on a running job's row, and send word to its worker, which else sees it at its next heartbeat."""
    if job.control == control:
        return
    job.control = control
    journal.record(session, [Entry(job.id, "control", {"control": control})])
    worker, job_id = job.worker, job.id
    after_commit(session, lambda: _tell_dispatcher("control", worker, job_id, control))


def _tell_dispatcher(method: str, *arguments: object) -> None:
    """Send word and do not wait: what the message says is in the database, where the dispatcher looks by itself too."""
    try:
        getattr(actors.find(DISPATCHER), method).remote(*arguments)
    except Unavailable:
        return


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits
