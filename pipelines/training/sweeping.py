"""The kind `sweep_blobs`: what was sent for a model, and is used by none, goes after a day."""

import asyncio
from datetime import timedelta

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select

from cluster.db import Database, now
from cluster.settings import get_settings
from jobs.context import Context
from jobs.registry import job
from pipelines.training import blobs, registry
from pipelines.training.blobs import Blob

UNUSED_HOURS = 24


class SweepSpec(BaseModel):
    """A sweep needs nothing."""

    model_config = ConfigDict(extra="forbid")


@job("sweep_blobs", spec=SweepSpec, admin_only=True, concurrency=1)
def sweep_blobs(context: Context, spec: SweepSpec) -> dict[str, int]:
    """Removes files that were sent for a model and that no model uses."""
    return {"blobs": asyncio.run(_sweep_alone())}


async def sweep(database: Database) -> int:
    """Remove blobs that nobody has touched for a day and no version uses; returns how many."""
    before = now() - timedelta(hours=UNUSED_HOURS)
    async with database.reading() as session:
        old = set(await session.scalars(select(Blob.sha256).where(Blob.used_at < before)))
    if not old:
        return 0
    async with registry.connect() as models:
        unused = old - await models.blobs()
    return sum([await blobs.forget(database, sha256, before) for sha256 in unused])


async def _sweep_alone() -> int:
    database = Database(get_settings().database_url, pool_size=1)
    try:
        return await sweep(database)
    finally:
        await database.close()
