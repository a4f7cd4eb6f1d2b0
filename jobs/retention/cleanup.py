"""Delete what deleted jobs have left elsewhere: their folders in storage, and their runs in MLflow.

A row of `deleted_jobs` remains until both are gone. So neither a crash nor an MLflow that is away leaves them behind.
"""

import asyncio
import logging

from sqlalchemy import delete, select

from cluster import mlflow_client, storage
from cluster.db import Database
from cluster.mlflow_client import MlflowRefused, MlflowRestClient, MlflowUnavailable
from cluster.settings import get_settings
from jobs.tables import DeletedJob

PAGE = 200

log = logging.getLogger(__name__)


async def delete_remains(database: Database) -> int:
    """Delete the remains of deleted jobs. Returns for how many. What fails is tried again by the next sweep."""
    uri = get_settings().mlflow_uri
    if uri is None:
        return await _clean_all(database, None)
    async with mlflow_client.connect(uri) as mlflow:
        return await _clean_all(database, mlflow)


async def _clean_all(database: Database, mlflow: MlflowRestClient | None) -> int:
    """Without a client there is no MLflow, so runs need not be deleted."""
    cleaned, after, is_away = 0, "", False
    while page := await _find_page(database, after):
        clean: list[str] = []
        for row in page:
            try:
                await asyncio.to_thread(storage.remove, storage.address(f"jobs/{row.job_id}"))
                if mlflow is not None and row.mlflow_run_id is not None:
                    if is_away:
                        continue
                    await mlflow.delete_run(row.mlflow_run_id)
                clean.append(row.job_id)
            except MlflowUnavailable as error:
                is_away = True
                log.warning("the runs of deleted jobs remain in MLflow until the next sweep: %s", error.message)
            except (MlflowRefused, OSError):
                log.exception("not all of the deleted job %s could be removed; the next sweep tries again", row.job_id)
        async with database.transaction() as session:
            await session.execute(delete(DeletedJob).where(DeletedJob.job_id.in_(clean)))
        cleaned, after = cleaned + len(clean), page[-1].job_id
    return cleaned


async def _find_page(database: Database, after: str) -> list[DeletedJob]:
    query = select(DeletedJob).where(DeletedJob.job_id > after).order_by(DeletedJob.job_id).limit(PAGE)
    async with database.read_transaction() as session:
        return list(await session.scalars(query))
