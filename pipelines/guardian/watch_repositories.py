"""The kind `watch_repositories`: enqueue a `watch_repo` job for each enabled repository."""

from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from cluster.db import Database, run_with_database
from jobs.context import Context
from jobs.registry import job
from pipelines.guardian.repositories import WATCH_ALL_KIND, Repository
from pipelines.guardian.watch_repo import GUARDIAN, enqueue_watch


class WatchAllSpec(BaseModel):
    model_config = ConfigDict(extra="forbid")


@job(WATCH_ALL_KIND, spec=WatchAllSpec, admin_only=True, routine=True)
def watch_repositories(context: Context, spec: WatchAllSpec) -> dict[str, Any]:
    """Enqueues a check of each repository that is watched."""
    return run_with_database(_enqueue_all)


async def _enqueue_all(database: Database) -> dict[str, Any]:
    async with database.transaction() as session:
        watched = await session.scalars(select(Repository).where(Repository.enabled).order_by(Repository.id))
        jobs = [await enqueue_watch(session, repository, GUARDIAN) for repository in watched.all()]
        return {"asked": [job.id for job in jobs]}
