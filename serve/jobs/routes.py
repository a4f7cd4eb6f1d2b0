"""The routes /api/v1/jobs: queue jobs, list them and control them."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.identity import account_limits
from cluster.ownership import Principal, visible
from cluster.times import RequestTime, UtcTime
from jobs import queue, wait_reasons
from jobs.queue import JobRequest
from jobs.registry import Resources, kinds
from jobs.states import State
from jobs.tables import Job, JobDependency
from serve.http.long_values import ShortValues, read_short_values, truncated_field, without
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/v1/jobs")

JobId = Annotated[str, Field(max_length=40)]
LONG_COLUMNS = (Job.spec, Job.result)


class JobError(BaseModel):
    code: str
    message: str


class JobView(BaseModel):
    id: str = Field(examples=["job_20261121_083000_k3x9"])
    kind: str
    spec: dict[str, Any]
    state: State
    phase: str | None
    progress: float = Field(ge=0, le=100)
    waiting_for: str | None = Field(description="What a queued job waits for.")
    priority: int
    attempt: int = Field(description="Number of the current attempt; 0 before the first.")
    max_attempts: int
    parent_id: str | None
    depends_on: list[str]
    result: Any
    error: JobError | None
    mlflow_run_id: str | None
    created_at: UtcTime
    started_at: UtcTime | None
    finished_at: UtcTime | None
    updated_at: UtcTime
    created_by: str
    truncated: list[str] = truncated_field()


class KindView(BaseModel):
    name: str
    description: str
    spec: dict[str, Any] = Field(description="JSON Schema of the spec.")
    resources: Resources | None = Field(description="Resources of a job. Null: they depend on its spec.")
    max_attempts: int
    time_limit: float | None
    stall_limit: float | None
    concurrency: int | None
    tracked: bool
    admin_only: bool | None = Field(description="Whether only administrators may run it. Null: it depends on its spec.")


@router.get("/kinds")
async def list_kinds(caller: CurrentCaller) -> list[KindView]:
    """List the kinds of job, with the schemas of their specs."""
    return [
        KindView(
            name=kind.name,
            description=kind.description,
            spec=kind.spec.model_json_schema(),
            resources=kind.resources if isinstance(kind.resources, Resources) else None,
            max_attempts=kind.max_attempts,
            time_limit=kind.time_limit,
            stall_limit=kind.stall_limit,
            concurrency=kind.concurrency,
            tracked=kind.tracked,
            admin_only=kind.admin_only if isinstance(kind.admin_only, bool) else None,
        )
        for _, kind in sorted(kinds().items())
    ]


@router.post("", status_code=201)
async def create_job(
    body: JobRequest,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> JobView:
    """Queue a job. Requests with the same Idempotency-Key and the same body create one job only."""
    async with get_database().transaction() as session:
        job = await queue.enqueue(session, body, caller, idempotency_key=idempotency_key)
        return await _view(session, job)


@router.get("")
async def list_jobs(
    caller: CurrentCaller,
    paging: PaginationParams,
    state: State | None = None,
    kind: Annotated[str | None, Query(max_length=100)] = None,
    parent_id: Annotated[str | None, Query(max_length=40)] = None,
    created_after: RequestTime | None = None,
    created_before: RequestTime | None = None,
) -> Page[JobView]:
    """List jobs, the newest first. Administrators see all jobs, others their own.

    Long specs and results are left out.
    """
    query = visible(select(Job), Job, caller).options(*without(*LONG_COLUMNS, Job.checkpoint))
    for column, value in ((Job.state, state), (Job.kind, kind), (Job.parent_id, parent_id)):
        if value is not None:
            query = query.where(column == value)
    if created_after:
        query = query.where(Job.created_at >= created_after)
    if created_before:
        query = query.where(Job.created_at < created_before)
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, query.order_by(Job.created_at.desc(), Job.id.desc()))
        short = await read_short_values(session, Job.id, LONG_COLUMNS, [job.id for job in rows.items])
        return paging.page(await _views(session, rows.items, short), rows.total)


@router.get("/{job_id}")
async def show_job(job_id: JobId, caller: CurrentCaller) -> JobView:
    async with get_database().read_transaction() as session:
        return await _view(session, await queue.get(session, job_id, caller))


@router.post("/{job_id}/cancel")
async def cancel_job(job_id: JobId, caller: CurrentCaller) -> JobView:
    """Cancel a job and its children. Waiting jobs end at once, running ones at their next report."""
    return await _change(queue.cancel, job_id, caller)


@router.post("/{job_id}/pause")
async def pause_job(job_id: JobId, caller: CurrentCaller) -> JobView:
    """Pause a job and its children. Queued jobs pause at once, running ones at their next checkpoint."""
    return await _change(queue.pause, job_id, caller)


@router.post("/{job_id}/resume")
async def resume_job(job_id: JobId, caller: CurrentCaller) -> JobView:
    """Resume a paused job and its paused children from their checkpoints."""
    return await _change(queue.resume, job_id, caller)


@router.post("/{job_id}/retry")
async def retry_job(job_id: JobId, caller: CurrentCaller) -> JobView:
    """Queue a failed or cancelled job again, from its last checkpoint and with all its attempts."""
    async with get_database().transaction() as session:
        # Before the job is locked: whoever queues a job locks the account first, and then what the job depends on.
        await account_limits.require_room(session, caller, "jobs")
        return await _apply(session, queue.retry, job_id, caller)


async def _change(action: Any, job_id: str, caller: Principal) -> JobView:
    async with get_database().transaction() as session:
        return await _apply(session, action, job_id, caller)


async def _apply(session: AsyncSession, action: Any, job_id: str, caller: Principal) -> JobView:
    job = await queue.get(session, job_id, caller, lock=True)
    await action(session, job)
    await session.flush()
    return await _view(session, job)


async def _view(session: AsyncSession, job: Job) -> JobView:
    whole = ShortValues({column.key: getattr(job, column.key) for column in LONG_COLUMNS}, [])
    return (await _views(session, [job], {job.id: whole}))[0]


async def _views(session: AsyncSession, jobs: list[Job], long_values: Mapping[str, ShortValues]) -> list[JobView]:
    reasons = await wait_reasons.reasons(session, jobs)
    rows = await session.execute(
        select(JobDependency.job_id, JobDependency.depends_on_id)
        .where(JobDependency.job_id.in_([job.id for job in jobs]))
        .order_by(JobDependency.depends_on_id)
    )
    dependencies: dict[str, list[str]] = {}
    for job_id, dependency_id in rows.all():
        dependencies.setdefault(job_id, []).append(dependency_id)
    copied_fields = set(JobView.model_fields) - {"waiting_for", "depends_on", "spec", "result", "truncated"}
    return [
        JobView(
            **{name: getattr(job, name) for name in copied_fields},
            spec=long_values[job.id].values["spec"] or {},
            result=long_values[job.id].values["result"],
            truncated=long_values[job.id].truncated,
            waiting_for=reasons.get(job.id),
            depends_on=dependencies.get(job.id, []),
        )
        for job in jobs
    ]
