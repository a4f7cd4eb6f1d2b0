"""Claim queued jobs: select the jobs that can run, assign workers, and grant leases.

A claim gives a job a new token; every later write of the worker must contain this token. A worker that was considered
dead may wake up and continue, but its writes are refused: execution is at least once, the outcome is recorded exactly
once.
"""

import math
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from sqlalchemy import func, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import now
from jobs import gpu_time, journal
from jobs.journal import JournalEntry
from jobs.leases.claim import OWN_WORKER, Claim
from jobs.leases.leadership import require_leadership
from jobs.states import State
from jobs.tables import Job


class Capacity(Protocol):
    """The free capacity of the cluster, as the dispatcher knows it."""

    def available_slots(self, *, heavy: bool) -> int:
        """Return about how many more light or heavy jobs could start now."""
        ...

    def allocate(self, job: Job) -> str | None:
        """Occupy capacity for a job, and return the name of its worker. None: the job does not fit now."""
        ...

    def wait_reason(self, demand: str) -> str:
        """Return what a job with this demand waits for when it does not fit."""
        ...


async def claim_jobs(session: AsyncSession, token: str, capacity: Capacity) -> list[Claim]:
    """Give queued jobs to workers, by priority, then age, as far as there is capacity.

    A job that does not fit lets smaller ones pass: its demand, or its kind if that is at its limit, is skipped for the
    rest of the round, so ten thousand such jobs cost no more than one. Light and heavy jobs do not compete: light ones
    share warm workers, heavy ones have an actor each.
    """
    leader = await require_leadership(session, token)
    is_due = (Job.state == State.QUEUED, Job.delayed, Job.run_after <= now())
    await session.execute(update(Job).where(*is_due).values(delayed=False, updated_at=Job.updated_at))
    free_by_kind = await _free_slots_by_kind(session)
    wait_reasons = {} if capacity.available_slots(heavy=True) else _remaining_wait_reasons(leader.waiting, free_by_kind)
    without_gpu_time = await gpu_time.exhausted_accounts(session)
    wait_reasons |= {f"account {account}": gpu_time.wait_reason() for account in without_gpu_time}
    chosen: list[tuple[Job, str]] = []
    for heavy in (False, True):
        full_demands: set[str] = set()
        while limit := capacity.available_slots(heavy=heavy):
            full_kinds = [kind for kind, left in free_by_kind.items() if left <= 0]
            chosen_ids = [job.id for job, _ in chosen]
            page = await _find_runnable(session, heavy, full_demands, full_kinds, chosen_ids, without_gpu_time, limit)
            for job in page:
                if job.concurrency is not None and free_by_kind.setdefault(job.kind, job.concurrency) <= 0:
                    wait_reasons[f"kind {job.kind}"] = (
                        f"one of the {job.concurrency} running '{job.kind}' jobs to finish"
                    )
                elif job.demand in full_demands or (worker := capacity.allocate(job)) is None:
                    full_demands.add(job.demand)
                    wait_reasons[f"demand {job.demand}"] = capacity.wait_reason(job.demand)
                else:
                    chosen.append((job, worker))
                    if job.concurrency is not None:
                        free_by_kind[job.kind] -= 1
            if len(page) < limit:
                break
    if not capacity.available_slots(heavy=False):
        wait_reasons["demand "] = capacity.wait_reason("")
    if leader.waiting != wait_reasons:
        leader.waiting = wait_reasons
    return await _grant_leases(session, chosen)


async def next_wakeup(session: AsyncSession) -> tuple[float, bool]:
    """Return the seconds until a delayed job may run, and whether a heavy job is queued."""
    delayed = await session.scalar(
        select(Job.run_after).where(Job.state == State.QUEUED, Job.delayed).order_by(Job.run_after).limit(1)
    )
    heavy = await session.scalar(
        select(Job.id)
        .where(Job.state == State.QUEUED, Job.unfinished_dependencies == 0, Job.demand > "", ~Job.delayed)
        .limit(1)
    )
    return math.inf if delayed is None else max(0.0, (delayed - now()).total_seconds()), heavy is not None


async def _free_slots_by_kind(session: AsyncSession) -> dict[str, int]:
    """Return how many more jobs may run of each limited kind that has running jobs."""
    rows = await session.execute(
        select(Job.kind, (func.min(Job.concurrency) - func.count()).label("free"))
        .where(Job.state == State.RUNNING, Job.concurrency.is_not(None))
        .group_by(Job.kind)
    )
    return {row.kind: row.free for row in rows.all()}


def _remaining_wait_reasons(wait_reasons: Mapping[str, str], free_by_kind: Mapping[str, int]) -> dict[str, str]:
    """Return the reasons that stay valid in a round without heavy jobs. Those of kinds with free slots do not."""
    full = {f"kind {kind}" for kind, left in free_by_kind.items() if left <= 0}
    return {
        key: reason
        for key, reason in wait_reasons.items()
        if key in full or (key.startswith("demand") and key != "demand ")
    }


async def _find_runnable(
    session: AsyncSession,
    heavy: bool,
    full_demands: Iterable[str],
    full_kinds: Iterable[str],
    excluded_ids: Iterable[str],
    without_gpu_time: Collection[str],
    limit: int,
) -> Sequence[Job]:
    query = (
        select(Job)
        .where(Job.state == State.QUEUED, Job.unfinished_dependencies == 0, ~Job.delayed)
        .where(Job.demand > "" if heavy else Job.demand == "")
        .where(Job.demand.not_in(full_demands), Job.kind.not_in(full_kinds), Job.id.not_in(excluded_ids))
        .order_by(Job.priority.desc(), Job.created_at)
        .limit(limit)
        .with_for_update(skip_locked=True, key_share=True)
    )
    if without_gpu_time:
        query = query.where(or_(Job.owner_id.is_(None), Job.owner_id.not_in(without_gpu_time), ~gpu_time.USES_GPU))
    return (await session.scalars(query)).all()


async def _grant_leases(session: AsyncSession, chosen: Sequence[tuple[Job, str]]) -> list[Claim]:
    if not chosen:
        return []
    moment = now()
    claims = [_build_claim(job, worker) for job, worker in chosen]
    started = {job.id: job.started_at or moment for job, _ in chosen}
    rows = [
        {
            "id": claim.job_id,
            "state": State.RUNNING,
            "worker": claim.worker,
            "lease_token": claim.token,
            "heartbeats": 0,
            "attempt": claim.attempt,
            "started_at": started[claim.job_id],
            "phase": None,
            "updated_at": moment,
        }
        for claim in claims
    ]
    await session.execute(update(Job), rows)
    entries = [
        JournalEntry(claim.job_id, "running", {"attempt": claim.attempt, "worker": claim.worker}, moment)
        for claim in claims
    ]
    journal.record(session, entries)
    return claims


def _build_claim(job: Job, worker: str) -> Claim:
    return Claim(
        job_id=job.id,
        token=secrets.token_hex(8),
        kind=job.kind,
        spec=job.spec,
        checkpoint=job.checkpoint,
        attempt=max(job.attempt, 1),
        max_attempts=job.max_attempts,
        time_limit=job.time_limit,
        stall_limit=job.stall_limit,
        resources=job.resources,
        worker=worker,
        owner_id=job.owner_id,
        is_resumed=job.started_at is not None,
        is_suspect=job.demand == OWN_WORKER,
    )
