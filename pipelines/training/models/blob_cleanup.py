"""Part of the hourly sweep: delete uploaded blobs that no model version has used for a day.

A registry may lose what it knows, or `mlflow.tracking_uri` may name another one. So the row of a blob has the model
that it was last seen in, and such a blob is deleted only if the registry still knows that model, without a version that
uses the blob. Versions leave their model behind when Forgearr deletes them.
"""

import logging
from collections.abc import Mapping
from datetime import timedelta

from sqlalchemy import select, update

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
        rows = list(await session.scalars(select(Blob)))
    if not rows:
        return 0
    try:
        async with registry.connect() as models:
            used, identities = await models.blobs(), await models.identities()
    except Unavailable as error:
        log.warning("No blobs are deleted, because the registry does not say which are in use: %s", error.message)
        return 0
    await _remember_models(database, rows, {sha256: identities.get(name) for sha256, name in used.items()})
    unused = [blob for blob in rows if blob.used_at < cutoff and blob.sha256 not in used]
    known_models = {None, *identities.values()}
    if kept := [blob for blob in unused if blob.model not in known_models]:
        log.warning(
            "%d blobs are kept, because MLflow does not know the models that were made of them: %s. Restore its "
            "registry, or correct mlflow.tracking_uri.",
            len(kept),
            ", ".join(sorted({(blob.model or "").partition("@")[0] for blob in kept})),
        )
    removable = [blob.sha256 for blob in unused if blob.model in known_models]
    return sum([await blobs.remove_unused(database, sha256, cutoff) for sha256 in removable])


async def _remember_models(database: Database, rows: list[Blob], model_by_blob: Mapping[str, str | None]) -> None:
    async with database.transaction() as session:
        for row in rows:
            model = model_by_blob.get(row.sha256)
            if model not in {None, row.model}:
                await session.execute(update(Blob).where(Blob.sha256 == row.sha256).values(model=model))
