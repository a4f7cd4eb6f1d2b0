"""The routes /v1/batches of OpenAI's API: files of requests that a job executes within a day."""

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query
from pydantic import BaseModel, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select

from cluster.db import get_database
from cluster.files.tables import MAX_ID_LENGTH
from cluster.ownership import visible
from jobs.tables import Job
from serve.http.pagination import CursorPage, cursor_page, keyset_slice
from serve.http.schemas import StrictModel
from serve.openai.batches import store as batch_store
from serve.openai.batches.store import Batch
from serve.openai.files.schemas import ExpiresAfter
from serve.openai.files.validation import BatchUrl
from serve.openai.responses.request import Metadata
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1/batches")

BatchId = Annotated[str, Field(max_length=100)]


class BatchRequest(StrictModel):
    input_file_id: str = Field(max_length=MAX_ID_LENGTH)
    endpoint: BatchUrl
    completion_window: Literal["24h"]
    metadata: Metadata | None = None
    output_expires_after: ExpiresAfter | None = Field(default=None, description="Null: the files never expire.")


class BatchError(BaseModel):
    code: str | None
    line: int | None
    message: str | None
    param: str | None


class BatchErrors(BaseModel):
    object: Literal["list"] = "list"
    data: list[BatchError]


class RequestCounts(BaseModel):
    total: int
    completed: int
    failed: int


class BatchObject(BaseModel):
    id: str = Field(examples=["batch_3f0c"])
    object: Literal["batch"] = "batch"
    endpoint: str
    input_file_id: str
    completion_window: Literal["24h"] = "24h"
    status: Literal[
        "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
    ]
    model: str | None = Field(description="Null: not known yet, or more than one.")
    errors: BatchErrors | None = Field(description="Why the batch failed.")
    output_file_id: str | None
    error_file_id: str | None
    request_counts: RequestCounts | None = Field(description="Null: not known yet.")
    usage: dict[str, Any] | None
    metadata: dict[str, str]
    created_at: int
    expires_at: int
    in_progress_at: int | None
    finalizing_at: int | None
    completed_at: int | None
    failed_at: int | None
    expired_at: int | None
    cancelling_at: int | None
    cancelled_at: int | None
    job_id: str = Field(description="The job that executes the batch.")


@router.post("")
async def create_batch(body: BatchRequest, caller: CurrentCaller) -> BatchObject:
    """Create a batch: the requests of a file are executed within a day."""
    expiry = body.output_expires_after
    async with get_database().transaction() as session:
        batch, job = await batch_store.create(
            session,
            endpoint=body.endpoint,
            input_file_id=body.input_file_id,
            labels=body.metadata or {},
            output_seconds=expiry.seconds if expiry else None,
            principal=caller,
        )
        return _view(batch, job)


@router.get("")
async def list_batches(
    caller: CurrentCaller,
    after: Annotated[BatchId | SkipJsonSchema[None], Query()] = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
) -> CursorPage[BatchObject]:
    """List batches, the newest first. Administrators see all batches, others their own."""
    query = visible(select(Batch), Batch, caller)
    async with get_database().read_transaction() as session:
        last = await batch_store.find(session, after, caller) if after is not None else None
        key, after_key = (Batch.created_at, Batch.id), last and (last.created_at, last.id)
        batches = await keyset_slice(session, query, key, after_key, limit)
        found = await session.scalars(select(Job).where(Job.id.in_([batch.job_id for batch in batches.items])))
        jobs = {job.id: job for job in found}
    return cursor_page([_view(batch, jobs[batch.job_id]) for batch in batches.items], batches.has_more)


@router.get("/{batch_id}")
async def show_batch(batch_id: BatchId, caller: CurrentCaller) -> BatchObject:
    """Get the status of a batch, and the ids of its output files when it has ended."""
    async with get_database().read_transaction() as session:
        batch = await batch_store.find(session, batch_id, caller)
        return _view(batch, await session.get_one(Job, batch.job_id))


@router.post("/{batch_id}/cancel")
async def cancel_batch(batch_id: BatchId, caller: CurrentCaller) -> BatchObject:
    """Cancel a batch. Its files have the responses until then."""
    async with get_database().transaction() as session:
        batch = await batch_store.find(session, batch_id, caller)
        return _view(batch, await batch_store.cancel(session, batch))


def _view(batch: Batch, job: Job) -> BatchObject:
    fields = batch_store.to_openai(batch, job)
    errors = fields.get("errors")
    return BatchObject(
        id=batch.id,
        endpoint=batch.endpoint,
        input_file_id=batch.input_file_id,
        status=fields["status"],
        model=fields.get("model"),
        errors=BatchErrors(data=errors) if errors else None,
        output_file_id=fields.get("output_file_id"),
        error_file_id=fields.get("error_file_id"),
        request_counts=fields.get("request_counts"),
        usage=fields.get("usage"),
        metadata=batch.labels,
        created_at=int(batch.created_at.timestamp()),
        expires_at=int(batch.expires_at.timestamp()),
        in_progress_at=fields.get("in_progress_at"),
        finalizing_at=fields.get("finalizing_at"),
        completed_at=fields.get("completed_at"),
        failed_at=fields.get("failed_at"),
        expired_at=fields.get("expired_at"),
        cancelling_at=int(batch.cancelling_at.timestamp()) if batch.cancelling_at else None,
        cancelled_at=fields.get("cancelled_at"),
        job_id=batch.job_id,
    )
