"""Delete finished jobs whose time has passed: each with its children, dependencies, ticks and events.

A few hundred are deleted in one transaction, so none is long. Each transaction locks its jobs and looks again whether
they are still finished and still unneeded. Their files and their runs in MLflow follow (jobs/retention/cleanup.py).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Row, SQLColumnExpression, and_, delete, insert, literal, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from cluster.db import Database, delete_rows, now
from cluster.settings import get_settings
from jobs.registry import kinds
from jobs.retention.references import FindNeeded, chunks, dependents_of, find_functions
from jobs.states import FINISHED, State
from jobs.tables import DeletedJob, IdempotencyKey, Job, JobDependency, JobEvent, ScheduleTick

PAGE = 200
EVENT_PAGE = 5000

OnDeleted = Callable[[int], None]
"""Called with the number of jobs that were deleted so far."""


@dataclass(frozen=True)
class Expiry:
    """Which jobs have expired. `key` is the column, with an index, in whose order they are found."""

    condition: ColumnElement[bool]
    key: SQLColumnExpression[Any]


@dataclass(frozen=True)
class Member:
    """A job of a family: one without a parent, and all its descendants."""

    id: str
    root_id: str
    depth: int
    may_go: bool
    leaves_remains: bool  # it may have files or a run in MLflow
    mlflow_run_id: str | None


async def delete_expired(database: Database, on_deleted: OnDeleted = lambda count: None) -> int:
    """Delete all jobs that have expired and that nothing needs. Returns their number."""
    find_needed = await find_functions(database)
    deleted = 0
    for expiry in _expiries():
        after: tuple[datetime, str] | None = None
        while page := await _find_page(database, expiry, after):
            roots = [row.id for row in page if row.parent_id is None]
            deleted += await _delete_families(database, roots, expiry, find_needed)
            on_deleted(deleted)
            after = (page[-1].key, page[-1].id)
    return deleted


def _expiries() -> Iterable[Expiry]:
    settings = get_settings().retention
    known = kinds()
    if settings.routine_hours is not None:
        before = now() - timedelta(hours=settings.routine_hours)
        for kind in known.values():
            if kind.routine:
                succeeded = and_(Job.kind == kind.name, Job.state == State.SUCCEEDED, Job.finished_at < before)
                yield Expiry(succeeded, Job.finished_at)
    if settings.job_days is not None:
        before = now() - timedelta(days=settings.job_days)
        # A job is created before it finishes. Nobody could tell what refers to a job of an unknown kind.
        old = and_(Job.created_at < before, Job.finished_at < before, Job.state.in_(FINISHED), Job.kind.in_(known))
        yield Expiry(old, Job.created_at)


async def _find_page(
    database: Database, expiry: Expiry, after: tuple[datetime, str] | None
) -> Sequence[Row[str, str | None, Any]]:
    query = select(Job.id, Job.parent_id, expiry.key.label("key")).where(expiry.condition)
    if after is not None:
        moment, job_id = after
        query = query.where(expiry.key >= moment, or_(expiry.key > moment, Job.id > job_id))
    async with database.read_transaction() as session:
        return (await session.execute(query.order_by(expiry.key, Job.id).limit(PAGE))).all()


async def _delete_families(
    database: Database, roots: Sequence[str], expiry: Expiry, find_needed: Iterable[FindNeeded]
) -> int:
    """Delete those of these jobs that nothing needs, with their descendants. Returns the number of all."""
    while roots:
        async with database.transaction() as session:
            members = await _lock_members(session, roots, expiry)
            doomed = await _without_needed(session, members, find_needed)
            if not await _delete_events(session, [member.id for member in doomed]):
                await _delete_rows(session, doomed)
                return len(doomed)
    return 0


async def _lock_members(session: AsyncSession, roots: Sequence[str], expiry: Expiry) -> list[Member]:
    """Lock the families of the roots that are still expired, and return their members, children before parents."""
    family = select(Job.id, Job.id.label("root_id"), literal(0).label("depth"))
    family = family.where(Job.id.in_(roots), expiry.condition).cte("family", recursive=True)
    child = aliased(Job)
    family = family.union_all(
        select(child.id, family.c.root_id, family.c.depth + 1)
        .select_from(child)
        .join(family, child.parent_id == family.c.id)
    )
    positions = {row.id: row for row in await session.execute(select(family))}
    known = kinds()
    members: list[Member] = []
    for chunk in chunks(sorted(positions)):
        columns = select(Job.id, Job.kind, Job.state, Job.tracked, Job.mlflow_run_id).where(Job.id.in_(chunk))
        for row in await session.execute(columns.order_by(Job.id).with_for_update()):
            kind, position = known.get(row.kind), positions[row.id]
            members.append(
                Member(
                    id=row.id,
                    root_id=position.root_id,
                    depth=position.depth,
                    may_go=row.state in FINISHED and kind is not None,
                    leaves_remains=row.tracked or kind is None or not kind.routine,
                    mlflow_run_id=row.mlflow_run_id,
                )
            )
    return sorted(members, key=lambda member: -member.depth)


async def _without_needed(
    session: AsyncSession, members: Sequence[Member], find_needed: Iterable[FindNeeded]
) -> list[Member]:
    """The members of the families of which no member is needed, also not by a job that stays."""
    root_of = {member.id: member.root_id for member in members}
    needed = {member.id for member in members if not member.may_go}
    for chunk in chunks(list(root_of)):
        for find in find_needed:
            needed.update(await find(session, chunk))
    kept_roots = {root_of[job_id] for job_id in needed if job_id in root_of}
    dependents = await dependents_of(session, list(root_of))
    while more := {
        root_of[dependency]
        for dependent, dependency in dependents
        if root_of[dependency] not in kept_roots and (dependent not in root_of or root_of[dependent] in kept_roots)
    }:
        kept_roots |= more
    return [member for member in members if member.root_id not in kept_roots]


async def _delete_events(session: AsyncSession, job_ids: Sequence[str]) -> bool:
    """Delete a page of events. Returns whether there may be more."""
    for chunk in chunks(job_ids):
        page = select(JobEvent.id).where(JobEvent.job_id.in_(chunk)).limit(EVENT_PAGE)
        if await delete_rows(session, delete(JobEvent).where(JobEvent.id.in_(page))) == EVENT_PAGE:
            return True
    return False


async def _delete_rows(session: AsyncSession, members: Sequence[Member]) -> None:
    for chunk in chunks([member.id for member in members]):
        await session.execute(delete(IdempotencyKey).where(IdempotencyKey.job_id.in_(chunk)))
        await session.execute(delete(ScheduleTick).where(ScheduleTick.job_id.in_(chunk)))
        await session.execute(delete(JobDependency).where(JobDependency.job_id.in_(chunk)))
    for chunk in chunks([member.id for member in members]):
        await session.execute(delete(Job).where(Job.id.in_(chunk)))
    run_of = {member.id: member.mlflow_run_id for member in members if member.leaves_remains}
    if run_of:
        keep_runs = not get_settings().retention.mlflow_runs
        rows = [{"job_id": job_id, "mlflow_run_id": None if keep_runs else run_of[job_id]} for job_id in run_of]
        await session.execute(insert(DeletedJob), rows)
