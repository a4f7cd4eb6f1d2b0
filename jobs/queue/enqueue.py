"""Add jobs to the queue.

Every function takes the caller's session, so a job is written in the transaction of the request, and a rolled-back
request leaves no job.
"""

import itertools
import secrets
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from pydantic import BaseModel
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import identity
from cluster.db import advisory_lock, now
from cluster.errors import Forbidden, UnprocessableRequest
from cluster.identity import account_limits
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs import journal
from jobs.journal import JournalEntry
from jobs.queue.control import pause
from jobs.queue.dependencies import link_dependencies
from jobs.queue.errors import IdempotencyConflict
from jobs.queue.requests import JobRequest, request_hash
from jobs.queue.rows import lock_jobs
from jobs.queue.wakeup import wake_dispatcher_on_commit
from jobs.registry import Kind, Resources, find_kind
from jobs.states import Control, State
from jobs.tables import IdempotencyKey, Job


async def enqueue(
    session: AsyncSession,
    request: JobRequest,
    principal: Principal,
    *,
    resources: Resources | None = None,
    idempotency_key: str | None = None,
    unless_queued: bool = False,
) -> Job:
    """Queue a job, or return the one that an earlier request with the same idempotency key has created.

    `resources` are the choice of our own code; those of the request are the choice of the principal.
    With `unless_queued`, a queued job of this kind with this spec is returned, whoever owns it.
    """
    if idempotency_key and (existing := await _find_by_key(session, request, principal, idempotency_key)):
        return existing
    kind, spec = check_request(request, principal)
    job = await _find_queued(session, kind, spec) if unless_queued else None
    if job is None:
        await account_limits.require_room(session, principal, "jobs")
        sized_request = request.model_copy(update={"resources": resources}) if resources else request
        (job,) = await _insert(session, [(sized_request, kind, spec)], principal)
        await link_dependencies(session, job, request.depends_on, principal)
    if idempotency_key:
        session.add(_build_idempotency_key(job, request, principal, idempotency_key))
        await session.flush()
    return job


async def enqueue_many(session: AsyncSession, requests: Sequence[JobRequest], principal: Principal) -> list[Job]:
    """Queue many jobs without dependencies at once."""
    if any(request.depends_on for request in requests):
        raise UnprocessableRequest("Jobs that are queued together cannot have dependencies; queue them one by one.")
    checked_requests = [(request, *check_request(request, principal)) for request in requests]
    await account_limits.require_room(session, principal, "jobs", len(requests))
    return await _insert(session, checked_requests, principal)


async def enqueue_child(
    session: AsyncSession,
    parent: Job,
    name: str,
    kind: str,
    spec: dict[str, Any],
    resources: Resources | None = None,
) -> Job:
    """Return the child with this name. It is queued, unless the parent has already done that before it restarted.

    Its priority and resources are those that its parent's function chose, whoever owns the parent.
    """
    existing = await session.scalar(select(Job).where(Job.parent_id == parent.id, Job.child_name == name))
    if existing is not None:
        return existing
    request = JobRequest(kind=kind, spec=spec, priority=parent.priority, resources=resources)
    principal = await identity.find_principal(session, parent.owner_id, parent.created_by)
    (child,) = await _insert(session, [(request, *_validate(request, principal))], principal)
    child.parent_id, child.child_name = parent.id, name
    if parent.control == Control.PAUSE:  # the pause reached all children that existed, so it must reach this one
        await pause(session, child)
    await session.flush()
    return child


def check_request(request: JobRequest, principal: Principal) -> tuple[Kind, dict[str, Any]]:
    """Return the kind of a request and its validated spec, if the principal may ask for that.

    What would take the machine from the others is for administrators.
    """
    kind, spec = _validate(request, principal)
    if principal.is_admin:
        return kind, spec
    if request.resources is not None:
        raise Forbidden(
            f"Only an administrator may set resources: leave them out, and the job gets those of '{kind.name}'."
        )
    if request.priority > 0:
        raise Forbidden("Only an administrator may set priority above 0.")
    if request.max_attempts is not None and request.max_attempts > kind.max_attempts:
        raise Forbidden(
            f"Only an administrator may set max_attempts above {kind.max_attempts}, the default of '{kind.name}'."
        )
    return kind, spec


def rejected_job(request: JobRequest, principal: Principal, error: dict[str, Any]) -> Job:
    """Build the row of a job that could not be queued, to record the reason."""
    moment = now()
    job = _build_job(request, Kind(request.kind, "", BaseModel, ""), request.spec, principal, moment)
    job.state, job.error, job.finished_at = State.FAILED, error, moment
    return job


def new_job_id(moment: datetime) -> str:
    """Return an id like job_YYYYMMDD_HHMMSS_xxxx.

    Four random characters would collide in a busy second, so each process counts up from a random start.
    """
    suffix = _base36(next(_suffixes) % 36**4)
    return f"job_{moment:%Y%m%d_%H%M%S}_{suffix:0>4}"


_suffixes = itertools.count(secrets.randbelow(36**4))


def _validate(request: JobRequest, principal: Principal) -> tuple[Kind, dict[str, Any]]:
    """Return the kind of a request and its validated spec, if the principal may run that."""
    kind = find_kind(request.kind)
    spec = kind.validate_spec(request.spec)
    kind.require_permitted(spec, principal)
    return kind, spec


async def _insert(
    session: AsyncSession, checked_requests: Sequence[tuple[JobRequest, Kind, dict[str, Any]]], principal: Principal
) -> list[Job]:
    """Queue jobs whose specs are validated."""
    moment = now()
    jobs = [_build_job(request, kind, spec, principal, moment) for request, kind, spec in checked_requests]
    session.add_all(jobs)
    await session.flush()
    journal.record(session, [JournalEntry(job.id, "queued", {"kind": job.kind}, moment) for job in jobs])
    wake_dispatcher_on_commit(session)
    return jobs


def _build_job(request: JobRequest, kind: Kind, spec: dict[str, Any], principal: Principal, moment: datetime) -> Job:
    resources = request.resources or kind.resources_for(spec)
    return Job(
        id=new_job_id(moment),
        kind=kind.name,
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
        owner_id=principal.id,
        created_by=principal.name,
        created_at=moment,
        updated_at=moment,
    )


async def _find_by_key(session: AsyncSession, request: JobRequest, principal: Principal, key: str) -> Job | None:
    await advisory_lock(session, f"idempotency {principal.id} {key}")
    row = await session.get(IdempotencyKey, (principal.id or principal.name, key))
    if row is None:
        return None
    if row.expires_at <= now():
        await session.execute(
            delete(IdempotencyKey).where(IdempotencyKey.owner == row.owner, IdempotencyKey.key == key)
        )
        session.expunge(row)
        return None
    if row.request_hash != request_hash(request):
        raise IdempotencyConflict(f"The idempotency key '{key}' was used for another request ({row.job_id}).")
    return await session.get_one(Job, row.job_id)


async def _find_queued(session: AsyncSession, kind: Kind, spec: dict[str, Any]) -> Job | None:
    await advisory_lock(session, f"queued {kind.name}")
    # Locked, so that the job stays queued until our commit.
    waiting = await lock_jobs(session, select(Job).where(Job.kind == kind.name, Job.state == State.QUEUED))
    return next((job for job in waiting if job.spec == spec), None)


def _build_idempotency_key(job: Job, request: JobRequest, principal: Principal, key: str) -> IdempotencyKey:
    return IdempotencyKey(
        owner=principal.id or principal.name,
        key=key,
        request_hash=request_hash(request),
        job_id=job.id,
        expires_at=now() + timedelta(hours=get_settings().jobs.idempotency_hours),
    )


def _base36(number: int) -> str:
    digits = ""
    while number:
        number, digit = divmod(number, 36)
        digits = "0123456789abcdefghijklmnopqrstuvwxyz"[digit] + digits
    return digits
