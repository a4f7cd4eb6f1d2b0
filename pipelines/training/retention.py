"""What keeps jobs of trainings: model versions, jobs that still read a training, and its age. And old sessions."""

import logging
from collections.abc import Callable, Collection, Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database, delete_rows, now
from cluster.errors import Unavailable
from cluster.settings import get_settings
from jobs.retention import FindNeeded
from jobs.states import FINISHED, State
from jobs.sweep import register_sweeper
from jobs.tables import Job
from pipelines.training.models import registry
from pipelines.training.models.versions import RegistryDisabled
from pipelines.training.sessions import TrainingSession

MAKERS = ("fine_tune", "export")
"""The kinds of job that a version refers to."""
READERS = ("export", "validate", "deploy", "compare")
"""The kinds of job whose specs name a training or an export."""
SESSION_PAGE = 500

HasVersion = Callable[[str, str | None], bool]
"""Whether the job with this id, and this run in MLflow, has made a version."""

log = logging.getLogger(__name__)


async def find_needed_jobs(database: Database) -> FindNeeded:
    """Return a function that finds the jobs that a version, a reader or their age keeps. See `register_references`."""
    started = now()
    async with database.read_transaction() as session:
        # Before the versions: an export that ends meanwhile is found here, or has made one of these versions.
        read_jobs = await _read_jobs(session, started)
    has_version = await _find_versions()

    async def find(session: AsyncSession, job_ids: Sequence[str]) -> Collection[str]:
        needed = set(job_ids) & (read_jobs | await _read_jobs(session, started))
        made = select(Job.id, Job.kind, Job.state, Job.finished_at, Job.mlflow_run_id)
        for row in await session.execute(made.where(Job.id.in_(job_ids), Job.kind.in_(MAKERS))):
            is_model = row.kind == "fine_tune" and row.state == State.SUCCEEDED
            if (is_model and _is_recent(row.finished_at)) or has_version(row.id, row.mlflow_run_id):
                needed.add(row.id)
        return needed

    return find


@register_sweeper("training_sessions")
async def delete_old_sessions(database: Database) -> int:
    """Delete sessions that were not changed for `retention.session_days`, and whose training has ended before."""
    days = get_settings().retention.session_days
    if days is None:
        return 0
    before = now() - timedelta(days=days)
    ended = select(Job.id).where(Job.id == TrainingSession.job_id, Job.state.in_(FINISHED), Job.finished_at < before)
    old = select(TrainingSession.id).where(
        TrainingSession.updated_at < before, or_(TrainingSession.job_id.is_(None), ended.exists())
    )
    deleted = 0
    while True:
        async with database.transaction() as session:
            page = delete(TrainingSession).where(TrainingSession.id.in_(old.limit(SESSION_PAGE)))
            count = await delete_rows(session, page)
        deleted += count
        if count < SESSION_PAGE:
            return deleted


async def _read_jobs(session: AsyncSession, since: datetime) -> set[str]:
    """The jobs that are named by jobs which have not finished, or which finished since then."""
    is_active = or_(Job.state.not_in(FINISHED), Job.finished_at >= since)
    specs = await session.scalars(select(Job.spec).where(Job.kind.in_(READERS), is_active))
    return {spec[name] for spec in specs for name in ("job_id", "export_job_id") if spec.get(name)}


async def _find_versions() -> HasVersion:
    try:
        async with registry.connect() as models:
            versions = await models.versions(skip_damaged=False)  # nobody knows what a damaged one needs
    except RegistryDisabled:
        return lambda job_id, run_id: run_id is not None  # it may have registered one before
    except Unavailable as error:
        log.warning("no training is deleted, because the registry does not say which have versions: %s", error.message)
        return lambda job_id, run_id: True
    job_ids = {job_id for version in versions for job_id in (version.job_id, version.export_job_id)}
    run_ids = {version.run_id for version in versions}  # a copy names no export, but has its files in its run
    return lambda job_id, run_id: job_id in job_ids or run_id in run_ids


def _is_recent(finished_at: datetime) -> bool:
    days = get_settings().retention.training_days
    return days is None or finished_at >= now() - timedelta(days=days)
