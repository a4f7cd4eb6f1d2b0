"""The queue as everybody but its workers sees it: put jobs in, look at them, and ask things of them.

Every function takes the caller's session, so that a job is written in the transaction of whatever asked for it, and a
rolled-back request leaves no job behind.
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
    idempotency_key: str | None = None,
    unless_queued: bool = False,
) -> Job:
    """Put one job into the queue, or find the one that the same request has made before.

    With `unless_queued`, one that waits to do the same will do, whoever asked for it.
    """
    if idempotency_key and (existing := await _find_by_key(session, request, principal, idempotency_key)):
        return existing
    kind = find_kind(request.kind)
    spec = kind.validate_spec(request.spec)
    if not principal.is_admin and kind.needs_admin(spec):
        raise Forbidden(f"Only an administrator may run '{kind.name}'{'' if kind.admin_only is True else ' so'}.")
    job = await _find_queued(session, kind, spec) if unless_queued else None
    if job is None:
        (job,) = await _insert(session, [(request, kind, spec)], principal)
        await link_dependencies(session, job, request.depends_on, principal)
    if idempotency_key:
        session.add(_build_idempotency_key(job, request, principal, idempotency_key))
        await session.flush()
    return job


async def enqueue_many(session: AsyncSession, requests: Sequence[JobRequest], principal: Principal) -> list[Job]:
    """Put many jobs without dependencies into the queue in one go."""
    if any(request.depends_on for request in requests):
        raise UnprocessableRequest("Jobs that are queued together cannot have dependencies; queue them one by one.")
    with_kinds = [(request, find_kind(request.kind)) for request in requests]
    return await _insert(
        session, [(request, kind, kind.validate_spec(request.spec)) for request, kind in with_kinds], principal
    )


async def enqueue_child(
    session: AsyncSession,
    parent: Job,
    name: str,
    kind: str,
    spec: dict[str, Any],
    resources: Resources | None = None,
) -> Job:
    """The child of this name: found when the parent asks again, after a crash or a park, else queued now."""
    existing = await session.scalar(select(Job).where(Job.parent_id == parent.id, Job.child_name == name))
    if existing is not None:
        return existing
    request = JobRequest(kind=kind, spec=spec, priority=parent.priority, resources=resources)
    principal = await identity.find_principal(session, parent.owner_id, parent.created_by)
    child = await enqueue(session, request, principal)
    child.parent_id, child.child_name = parent.id, name
    if parent.control == Control.PAUSE:  # asked of the whole family, a moment before this one was born
        await pause(session, child)
    await session.flush()
    return child


def rejected_job(request: JobRequest, principal: Principal, error: dict[str, Any]) -> Job:
    """A job that could not even be queued, kept so that somebody sees why."""
    moment = now()
    job = _build_job(request, Kind(request.kind, "", BaseModel, ""), request.spec, principal, moment)
    job.state, job.error, job.finished_at = State.FAILED, error, moment
    return job


def new_job_id(moment: datetime) -> str:
    """job_YYYYMMDD_HHMMSS_xxxx. Four letters are few for a busy second: each process counts up from a random start."""
    suffix = _base36(next(_suffixes) % 36**4)
    return f"job_{moment:%Y%m%d_%H%M%S}_{suffix:0>4}"


_suffixes = itertools.count(secrets.randbelow(36**4))


async def _insert(
    session: AsyncSession, checked_requests: Sequence[tuple[JobRequest, Kind, dict[str, Any]]], principal: Principal
) -> list[Job]:
    """Queue these; their specs have been checked."""
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
    # Locked, so that it waits until we have said our word.
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
