"""What keeps finished jobs: modules above the queue tell which jobs their rows, or their models, refer to."""

from collections.abc import Awaitable, Callable, Collection, Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from cluster.db import Database, now
from cluster.settings import get_settings
from jobs.registry import kinds
from jobs.tables import IdempotencyKey, Job, JobDependency, JobEvent, Leadership, Schedule

FindNeeded = Callable[[AsyncSession, Sequence[str]], Awaitable[Iterable[str]]]
"""Returns those of the given jobs that are still needed. It is called in the transaction that deletes the others."""
Prepare = Callable[[Database], Awaitable[FindNeeded]]
"""Reads what no transaction may wait for, once in each sweep. Returns the function for the transactions."""

CHUNK = 5000

_columns: list[InstrumentedAttribute[Any]] = [Schedule.last_job_id]
_prepare: dict[str, Prepare] = {}


def keep_jobs_in(*columns: InstrumentedAttribute[Any]) -> None:
    """Keep all jobs whose ids are in these columns."""
    _columns.extend(columns)


def register_references(name: str, prepare: Prepare) -> None:
    """Keep the jobs that a function finds. The module that declares their kind registers it."""
    _prepare[name] = prepare


async def find_functions(database: Database) -> list[FindNeeded]:
    """Return all functions that find needed jobs."""
    kinds()  # imports all modules, so that they have registered what refers to their jobs
    return [_in_columns, _with_valid_keys, _untold, *[await prepare(database) for prepare in _prepare.values()]]


async def dependents_of(session: AsyncSession, job_ids: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of a job that depends on one of these, and that one."""
    pairs: list[tuple[str, str]] = []
    for chunk in chunks(job_ids):
        links = select(JobDependency.job_id, JobDependency.depends_on_id).where(JobDependency.depends_on_id.in_(chunk))
        pairs += [(row.job_id, row.depends_on_id) for row in await session.execute(links)]
    return pairs


def chunks(job_ids: Sequence[str]) -> list[Sequence[str]]:
    """Split ids into parts that one statement can take."""
    return [job_ids[start : start + CHUNK] for start in range(0, len(job_ids), CHUNK)]


async def _in_columns(session: AsyncSession, job_ids: Sequence[str]) -> Collection[str]:
    return {
        job_id
        for column in _columns
        for job_id in await session.scalars(select(column).where(column.in_(job_ids)).distinct())
    }


async def _with_valid_keys(session: AsyncSession, job_ids: Sequence[str]) -> Collection[str]:
    """The jobs that a repeated request must still find."""
    keys = select(IdempotencyKey.job_id).where(IdempotencyKey.job_id.in_(job_ids), IdempotencyKey.expires_at > now())
    return set(await session.scalars(keys))


async def _untold(session: AsyncSession, job_ids: Sequence[str]) -> Collection[str]:
    """The tracked jobs with events that were not sent to MLflow yet."""
    if get_settings().mlflow_uri is None:
        return set()
    synced_until = await session.scalar(select(Leadership.tracked_until)) or 0
    tracked = select(Job.id).where(Job.id.in_(job_ids), Job.tracked)
    unsent = select(JobEvent.job_id).where(JobEvent.job_id.in_(tracked), JobEvent.id > synced_until).distinct()
    return set(await session.scalars(unsent))
