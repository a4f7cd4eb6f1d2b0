"""The routes /v1/fine_tuning/jobs of OpenAI's API. A fine-tuning job is a job of the kind forge or fine_tune."""

from typing import Annotated

from fastapi import APIRouter, Header, Query, Request
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import InvalidRequest
from cluster.ownership import Principal
from jobs import queue
from jobs.queue import JobRequest
from jobs.tables import Job
from pipelines.training.data import resolution
from pipelines.training.spec import DataSource
from serve.http.pagination import CursorPage, cursor_page, keyset_slice, slice_after
from serve.jobs.routes import JobId
from serve.models import fine_tuned_names
from serve.openai.fine_tuning import events as fine_tuning_events
from serve.openai.fine_tuning.creation import MethodNotAvailable, forge_spec, resolve_base_model
from serve.openai.fine_tuning.schemas import Checkpoint, FineTuningJob, FineTuningJobEvent, FineTuningJobRequest
from serve.openai.fine_tuning.view import checkpoint_view, job_view, with_metadata
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/v1/fine_tuning/jobs")

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[Annotated[str, Field(max_length=100)] | SkipJsonSchema[None], Query()]


@router.post("")
async def create_fine_tuning_job(
    request: Request,
    body: FineTuningJobRequest,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> FineTuningJob:
    """Fine-tune a model with a file, export it and validate it. Its name works only for you and administrators."""
    if body.method and body.method.type == "reinforcement":
        raise MethodNotAvailable
    spec = forge_spec(body, await resolve_base_model(request, body.model, caller), caller)
    async with get_database().transaction() as session:
        for file_id in (body.training_file, body.validation_file):
            if file_id is not None:
                await resolution.require_usable(session, DataSource(file=file_id), caller, spec["method"])
        job = await queue.enqueue(session, JobRequest(kind="forge", spec=spec), caller, idempotency_key=idempotency_key)
        return await job_view(session, job)


@router.get("")
async def list_fine_tuning_jobs(
    request: Request, caller: CurrentCaller, after: After = None, limit: Limit = 20
) -> CursorPage[FineTuningJob]:
    """List fine-tuning jobs, the newest first, including those that other APIs created.

    `metadata[key]=value` selects jobs by their metadata.
    """
    async with get_database().read_transaction() as session:
        query = with_metadata(session, fine_tuned_names.fine_tuning_jobs(caller), request)
        last = await _find(session, after, caller) if after is not None else None
        key, after_key = (Job.created_at, Job.id), last and (last.created_at, last.id)
        jobs = await keyset_slice(session, query, key, after_key, limit)
        return cursor_page([await job_view(session, job) for job in jobs.items], jobs.has_more)


@router.get("/{job_id}")
async def show_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """Get one fine-tuning job."""
    async with get_database().read_transaction() as session:
        return await job_view(session, await _find(session, job_id, caller))


@router.post("/{job_id}/cancel")
async def cancel_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """Cancel a job. A waiting job ends at once, a running one at its next report."""
    async with get_database().transaction() as session:
        job = await _find(session, job_id, caller, lock=True)
        await queue.cancel(session, job)
        await session.flush()
        return await job_view(session, job)


@router.post("/{job_id}/pause")
async def pause_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """Pause a job. A waiting job pauses at once, a running one at its next checkpoint."""
    async with get_database().transaction() as session:
        job = await _find(session, job_id, caller, lock=True)
        await queue.pause(session, job)
        await session.flush()
        return await job_view(session, job)


@router.post("/{job_id}/resume")
async def resume_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """Resume a paused job from its checkpoint."""
    async with get_database().transaction() as session:
        job = await _find(session, job_id, caller, lock=True)
        await queue.resume(session, job)
        await session.flush()
        return await job_view(session, job)


@router.get("/{job_id}/events")
async def list_fine_tuning_events(
    job_id: JobId, caller: CurrentCaller, after: After = None, limit: Limit = 20
) -> CursorPage[FineTuningJobEvent]:
    """List the events of a job, the newest first: messages, and the metrics of steps."""
    async with get_database().read_transaction() as session:
        job = await _find(session, job_id, caller)
        events = await fine_tuning_events.read(session, job, after, limit)
    return cursor_page(events.items, events.has_more)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: JobId, caller: CurrentCaller, after: After = None, limit: Limit = 10
) -> CursorPage[Checkpoint]:
    """List the models after the last three epochs, the newest first. Requests can name each of them."""
    async with get_database().read_transaction() as session:
        job = await _find(session, job_id, caller)
        epochs = fine_tuned_names.epochs(await fine_tuned_names.find_fine_tune_job(session, job))
    checkpoints = [checkpoint_view(job, epoch) for epoch in reversed(epochs)]
    missing = InvalidRequest(f"There is no checkpoint '{after}' of {job.id}.")
    found = slice_after(checkpoints, after, limit, missing)
    return cursor_page(found.items, found.has_more)


async def _find(session: AsyncSession, job_id: str, principal: Principal, *, lock: bool = False) -> Job:
    query = fine_tuned_names.fine_tuning_jobs(principal).where(Job.id == job_id)
    job = await session.scalar(query.with_for_update(key_share=True) if lock else query)
    if job is None:
        raise queue.JobNotFound(f"There is no fine-tuning job '{job_id}'.")
    return job
