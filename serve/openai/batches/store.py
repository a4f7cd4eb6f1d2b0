"""The table of batches, and their public form.

The row of a batch has its request. The status is in the checkpoint and the result of its job, which are written under
the job's lease: a worker that lost its lease cannot change the status.
"""

import asyncio
from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Any
from uuid import uuid4

from sqlalchemy import ForeignKey, String, delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import storage
from cluster.db import Base, Database, delete_rows, now
from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.files import store as file_store
from cluster.files.tables import MAX_ID_LENGTH
from cluster.identity import account_limits
from cluster.ownership import Principal, require
from cluster.settings import get_settings
from jobs import queue
from jobs.queue import JobRequest
from jobs.retention import keep_jobs_in
from jobs.states import FINISHED, RETRYABLE, State
from jobs.sweep import register_sweeper
from jobs.tables import Job

KIND = "batch"
COMPLETION_WINDOW = timedelta(hours=24)
ID_MAX = 60
SWEEP_PAGE = 100
FINAL_STATUSES = {"failed", "completed", "expired", "cancelled"}


class BatchNotFound(NotFound):
    """There is no such batch."""

    code = "BATCH_NOT_FOUND"


class BatchEnded(Conflict):
    """The batch has ended."""

    code = "BATCH_ENDED"


class NoBatchFile(InvalidRequest):
    """The input file of a batch must have the purpose batch."""

    code = "NO_BATCH_FILE"


class Batch(Base):
    __tablename__ = "batches"

    id: Mapped[str] = mapped_column(String(ID_MAX), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id"), index=True)
    endpoint: Mapped[str] = mapped_column(String(100))
    input_file_id: Mapped[str] = mapped_column(String(MAX_ID_LENGTH))  # may be deleted
    labels: Mapped[dict[str, Any]]  # OpenAI's `metadata`
    output_seconds: Mapped[int | None]  # lifetime of the output files; None: no limit
    owner_id: Mapped[str | None] = mapped_column(String(36), index=True)  # None: without an account
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now, index=True)
    expires_at: Mapped[datetime]
    cancelling_at: Mapped[datetime | None]  # when its cancellation was requested


keep_jobs_in(Batch.job_id)


@account_limits.measures("batches", "unfinished batches", "Wait until one has ended, or cancel one.")
async def count_unfinished(session: AsyncSession, account_ids: Collection[str]) -> dict[str, int]:
    return await queue.count_unfinished(session, account_ids, KIND)


async def create(
    session: AsyncSession,
    *,
    endpoint: str,
    input_file_id: str,
    labels: dict[str, str],
    output_seconds: int | None,
    principal: Principal,
) -> tuple[Batch, Job]:
    """Create a batch, and queue the job that executes it."""
    file = await file_store.find(session, input_file_id, principal)
    if file.purpose != "batch":
        raise NoBatchFile(
            f"The file '{file.id}' has the purpose {file.purpose}; a batch needs a file with the purpose batch."
        )
    await account_limits.require_room(session, principal, "batches")
    await account_limits.require_any_room(session, principal, "files_mb")
    batch_id, moment = f"batch_{uuid4().hex}", now()
    job = await queue.enqueue(session, JobRequest(kind=KIND, spec={"batch_id": batch_id}), principal)
    batch = Batch(
        id=batch_id,
        job_id=job.id,
        endpoint=endpoint,
        input_file_id=input_file_id,
        labels=labels,
        output_seconds=output_seconds,
        owner_id=principal.id,
        created_by=principal.name,
        created_at=moment,
        expires_at=moment + COMPLETION_WINDOW,
    )
    session.add(batch)
    await session.flush()
    return batch, job


async def find(session: AsyncSession, batch_id: str, principal: Principal) -> Batch:
    batch = await session.get(Batch, batch_id)
    return require(batch, principal, BatchNotFound(f"There is no batch '{batch_id}'."))


async def cancel(session: AsyncSession, batch: Batch) -> Job:
    """Request the end of a batch. Its job is not cancelled: it saves the results until then."""
    job = await session.get_one(Job, batch.job_id, with_for_update={"key_share": True})
    status = to_openai(batch, job)["status"]
    if status in FINAL_STATUSES:
        raise BatchEnded(f"The batch '{batch.id}' cannot be cancelled: it is {status}.")
    batch.cancelling_at = batch.cancelling_at or now()
    if job.state == State.PAUSED:
        await queue.resume(session, job)
    return job


def parts_folder(batch_id: str) -> str:
    """The folder in storage with the results, until they are joined to files."""
    return f"batches/{batch_id}"


@register_sweeper("batches")
async def remove_old(database: Database) -> int:
    """Delete batches that finished `retention.batch_days` ago, with their output files."""
    days = get_settings().retention.batch_days
    if days is None:
        return 0
    # The job of a batch that failed may be retried until its batch is gone.
    jobs = select(Job.id).where(Job.state.in_(FINISHED), Job.finished_at < now() - timedelta(days=days))
    old = select(Batch.id, Job.result).join(Job, Job.id == Batch.job_id).where(Job.id.in_(jobs)).limit(SWEEP_PAGE)
    removed = 0
    while True:
        async with database.read_transaction() as session:
            page = (await session.execute(old)).all()
        if not page:
            return removed
        for batch_id, _ in page:
            await asyncio.to_thread(storage.remove, storage.address(parts_folder(batch_id)))
        file_ids = [(result or {}).get(name) for _, result in page for name in ("output_file_id", "error_file_id")]
        ids = [batch_id for batch_id, _ in page]
        async with database.transaction() as session:
            await file_store.expire(session, [file_id for file_id in file_ids if file_id])
            removed += await delete_rows(session, delete(Batch).where(Batch.id.in_(ids), Batch.job_id.in_(jobs)))


@register_sweeper("batch_parts")
async def remove_left_over(database: Database) -> int:
    """Delete the parts of batches whose job failed or was cancelled, after the time for a retry has passed."""
    before = now() - timedelta(days=get_settings().jobs.event_days)
    ended_early = select(Batch.id).join(Job, Job.id == Batch.job_id)
    async with database.read_transaction() as session:
        old = ended_early.where(Job.state.in_(RETRYABLE), Job.finished_at < before)
        addresses = [storage.address(parts_folder(batch_id)) for batch_id in await session.scalars(old)]
    removed = 0
    for address in addresses:
        if await asyncio.to_thread(storage.exists, address):
            await asyncio.to_thread(storage.remove, address)
            removed += 1
    return removed


def to_openai(batch: Batch, job: Job) -> dict[str, Any]:
    """The fields of the public form that the job determines."""
    fields: dict[str, Any] = {"status": "validating", **(job.checkpoint or {}).get("told", {}), **(job.result or {})}
    if job.state in FINISHED and fields["status"] not in FINAL_STATUSES:
        fields |= _ended_early(job)
    if fields["status"] not in FINAL_STATUSES and batch.cancelling_at is not None:
        fields["status"] = "cancelling"
    return fields


def _ended_early(job: Job) -> dict[str, Any]:
    """The status of a batch whose job failed or was cancelled."""
    moment = int(job.finished_at.timestamp()) if job.finished_at else None
    if job.state == State.CANCELLED:
        return {"status": "cancelled", "cancelled_at": moment}
    error = {"line": None, "param": None, **(job.error or {})}
    return {"status": "failed", "failed_at": moment, "errors": [error]}
