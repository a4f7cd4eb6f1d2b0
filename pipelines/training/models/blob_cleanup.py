"""Part of the hourly sweep: delete uploaded blobs that no model version has used for a day."""

import logging
from datetime import timedelta

from sqlalchemy import select

from cluster.db import Database, now
from cluster.errors import Unavailable
from jobs.sweep import register_sweeper
from pipelines.training.models import blobs, registry
from pipelines.training.models.blobs import Blob

UNUSED_HOURS = 24

log = logging.getLogger(__name__)


@register_sweeper("blobs")
async def sweep(database: Database) -> int:
    """Delete blobs that were not touched for a day and that no version uses. Returns their number."""
    cutoff = now() - timedelta(hours=UNUSED_HOURS)
    async with database.read_transaction() as session:
        old = set(await session.scalars(select(Blob.sha256).where(Blob.used_at < cutoff)))
    if not old:
        return 0
    try:
        async with registry.connect() as models:
            unused = old - await models.blobs()
    except Unavailable as error:
        log.warning("No blobs are deleted, because the registry does not say which are in use: %s", error.message)
        return 0
    return sum([await blobs.remove_unused(database, sha256, cutoff) for sha256 in unused])
