"""The routes /api/training/sessions: trainings that are configured first and started later."""

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import events
from cluster import nodes as cluster_nodes
from cluster.db import after_commit, get_database, now
from cluster.errors import Conflict, InvalidRequest, NotFound
from cluster.ownership import LOCAL, Principal, require, visible
from cluster.times import UtcTime
from jobs import queue
from jobs.queue import JobRequest
from jobs.states import FINISHED
from jobs.tables import Job
from pipelines.training import progress, sessions
from pipelines.training import workers as training_workers
from pipelines.training.data import resolution
from pipelines.training.sessions import TrainingSession
from pipelines.training.spec import DataSource, FineTuneSpec, PromptFilter
from serve.http.errors import SCHEMA_REFERENCE
from serve.http.long_values import ShortValues, read_short_values, truncated_field, without
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/api/training/sessions")

SessionId = Annotated[str, Path(max_length=40)]
JOB_PREFIX = "job_"
LONG_COLUMNS = (TrainingSession.config, TrainingSession.prompt_ids)


class SessionNotFound(NotFound):
    """There is no such training session."""

    code = "TRAINING_SESSION_NOT_FOUND"


class SessionStarted(Conflict):
    """The training session was started already."""

    code = "TRAINING_SESSION_STARTED"


Config = Annotated[dict[str, Any], WithJsonSchema(sessions.config_schema(SCHEMA_REFERENCE))]


class SessionRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(min_length=1, max_length=200, examples=["Custom Assistant v1"])
    description: str | None = Field(default=None, max_length=10_000)
    base_model: str = Field(default="forgearr/tiny", min_length=1, max_length=300)
    config: Config = Field(
        default_factory=dict,
        max_length=100,
        description="num_epochs, learning_rate, batch_size and all other fields of the spec of a fine_tune job.",
        examples=[{"num_epochs": 3, "learning_rate": 2e-4, "batch_size": 4}],
    )


class StartRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    worker_id: int | None = Field(default=None, ge=1, le=2**31 - 1, description="Null: any worker with free resources.")
    prompt_ids: list[int] | None = Field(default=None, min_length=1, max_length=100_000)
    data: DataSource | None = Field(default=None, description="Training data instead of prompt_ids.")


class SessionView(BaseModel):
    id: str
    name: str
    description: str | None
    base_model: str
    config: dict[str, Any]
    status: progress.Status | None = Field(description="Null: not started.")
    worker_id: int | None
    prompt_ids: list[int] | None
    job_id: str | None
    created_by: str
    created_at: UtcTime
    updated_at: UtcTime
    truncated: list[str] = truncated_field()


class SessionStatus(progress.TrainingMetrics):
    session_id: str
    status: progress.Status | None = Field(description="Null: not started.")
    error: str | None = None


@router.get("")
async def list_sessions(caller: CurrentCaller, paging: PaginationParams) -> Page[SessionView]:
    """List training sessions, the newest first. Administrators see all sessions, others their own.

    Long configurations and lists of prompts are left out.
    """
    query = visible(select(TrainingSession), TrainingSession, caller).options(*without(*LONG_COLUMNS))
    async with get_database().read_transaction() as session:
        rows = await paging.read(session, query.order_by(TrainingSession.created_at.desc(), TrainingSession.id))
        ids = [row.id for row in rows.items]
        short = await read_short_values(session, TrainingSession.id, LONG_COLUMNS, ids)
        return paging.page(await _views(session, rows.items, short), rows.total)


@router.post("", status_code=201)
async def create_session(body: SessionRequest, caller: CurrentCaller) -> SessionView:
    """Create a training session. Nothing runs until it is started."""
    sessions.validate_config(body.name, body.base_model, body.config)
    row = TrainingSession(**body.model_dump(), owner_id=caller.id, created_by=caller.name)
    async with get_database().transaction() as session:
        session.add(row)
        await session.flush()
        return await _view(session, row)


@router.get("/{session_id}")
async def show_session(session_id: SessionId, caller: CurrentCaller) -> SessionView:
    async with get_database().read_transaction() as session:
        return await _view(session, await find_session(session, session_id, caller))


@router.put("/{session_id}")
async def change_session(session_id: SessionId, body: SessionRequest, caller: CurrentCaller) -> SessionView:
    """Replace the configuration of a session that was not started yet."""
    sessions.validate_config(body.name, body.base_model, body.config)
    async with get_database().transaction() as session:
        row = await find_session(session, session_id, caller, lock=True)
        if row.job_id is not None:
            raise SessionStarted(f"The session was started as {row.job_id}. Create a new session for other settings.")
        for name, value in body.model_dump().items():
            setattr(row, name, value)
        await session.flush()
        return await _view(session, row)


@router.delete("/{session_id}", status_code=204)
async def delete_session(session_id: SessionId, caller: CurrentCaller) -> None:
    """Delete a session that is not running. Its job and the trained model stay."""
    async with get_database().transaction() as session:
        row = await find_session(session, session_id, caller, lock=True)
        job = await session.get(Job, row.job_id) if row.job_id else None
        if job is not None and job.state not in FINISHED:
            raise SessionStarted(f"The session is still {job.state}. Cancel it first.")
        await session.delete(row)


@router.post("/{session_id}/start")
async def start_session(session_id: SessionId, body: StartRequest, caller: CurrentCaller) -> SessionView:
    """Queue the training with these prompts, on that worker. A session can be started again after its training."""
    data = body.data or (DataSource(prompts=PromptFilter(ids=body.prompt_ids)) if body.prompt_ids else None)
    if data is None or (body.data and body.prompt_ids):
        raise InvalidRequest("Send either prompt_ids, or data with one of dataset, prompts and folder.")
    async with get_database().read_transaction() as session:
        await find_session(session, session_id, caller)
        is_unknown_worker = body.worker_id is not None and not await training_workers.worker_exists(
            session, body.worker_id
        )
    alive = await asyncio.to_thread(cluster_nodes.alive_nodes) if is_unknown_worker else []
    async with get_database().transaction() as session:
        row = await find_session(session, session_id, caller, lock=True)
        previous_job = await session.get(Job, row.job_id) if row.job_id else None
        if previous_job is not None and previous_job.state not in FINISHED:
            raise SessionStarted(f"The session is already {previous_job.state}, as {previous_job.id}.")
        if alive:
            await training_workers.register_workers(session, alive)
        labels = await training_workers.labels_of(session, body.worker_id) if body.worker_id else {}
        spec = sessions.build_spec(row.name, row.base_model, row.config, data, labels)
        await resolution.require_usable(session, data, caller, spec.method)
        job = await queue.enqueue(session, JobRequest(kind="fine_tune", spec=spec.model_dump(mode="json")), caller)
        row.job_id, row.worker_id, row.prompt_ids = job.id, body.worker_id, body.prompt_ids
        await session.flush()
        started_event = events.build_message([f"training:{row.id}"], "training.started", {"job_id": job.id}, now())
        after_commit(session, lambda: events.publish([started_event]))
        return await _view(session, row)


@router.get("/{session_id}/status")
async def session_status(session_id: SessionId, caller: CurrentCaller) -> SessionStatus:
    async with get_database().read_transaction() as session:
        return await status_of(session, await find_session(session, session_id, caller))


@router.post("/{session_id}/cancel")
async def cancel_session(session_id: SessionId, caller: CurrentCaller) -> SessionStatus:
    """Cancel the training. A waiting one ends at once, a running one at its next report."""
    async with get_database().transaction() as session:
        row = await find_session(session, session_id, caller, lock=True)
        if row.job_id is None:
            raise Conflict("The session was not started, so there is nothing to cancel.")
        await queue.cancel(session, await queue.get(session, row.job_id, LOCAL, lock=True))
        await session.flush()
        return await status_of(session, row)


async def training_status(training_id: str, caller: Principal) -> tuple[set[str], SessionStatus]:
    """The rooms and the status of a training, whose id is that of its session or of its job."""
    async with get_database().read_transaction() as session:
        if not training_id.startswith(JOB_PREFIX):
            row = await find_session(session, training_id, caller)
            return {f"job:{row.job_id}"} if row.job_id else set(), await status_of(session, row)
        job = await queue.get(session, training_id, caller)
        if job.kind not in progress.TRAINING_KINDS:
            raise SessionNotFound(f"{training_id} is a job of the kind '{job.kind}', not a training.")
        rooms = {f"job:{job_id}" for job_id in await progress.related_job_ids(session, job)}
        return rooms, await _status(session, job, training_id)


async def find_session(
    session: AsyncSession, session_id: str, caller: Principal, *, lock: bool = False
) -> TrainingSession:
    row = await session.get(TrainingSession, session_id, with_for_update=lock)
    return require(row, caller, SessionNotFound(f"There is no training session '{session_id}'."))


async def status_of(session: AsyncSession, row: TrainingSession) -> SessionStatus:
    job = await session.get(Job, row.job_id) if row.job_id else None
    if job is None:
        epochs = row.config.get("num_epochs", row.config.get("epochs", FineTuneSpec.model_fields["epochs"].default))
        total_epochs = None if row.config.get("max_steps") else math.ceil(epochs)
        return SessionStatus(session_id=row.id, status=None, total_epochs=total_epochs)
    return await _status(session, job, row.id)


async def _status(session: AsyncSession, job: Job, training_id: str) -> SessionStatus:
    current = await progress.get_progress(session, job)
    return SessionStatus(session_id=training_id, error=job.error["message"] if job.error else None, **dict(current))


async def _view(session: AsyncSession, row: TrainingSession) -> SessionView:
    whole = ShortValues({column.key: getattr(row, column.key) for column in LONG_COLUMNS}, [])
    return (await _views(session, [row], {row.id: whole}))[0]


async def _views(
    session: AsyncSession, rows: Sequence[TrainingSession], long_values: Mapping[str, ShortValues]
) -> list[SessionView]:
    started = await session.scalars(select(Job).where(Job.id.in_([row.job_id for row in rows if row.job_id])))
    statuses: dict[str | None, progress.Status] = {
        job.id: await progress.get_status(session, job) for job in started.all()
    }
    copied_fields = set(SessionView.model_fields) - {"status", "config", "prompt_ids", "truncated"}
    return [
        SessionView(
            **{name: getattr(row, name) for name in copied_fields},
            status=statuses.get(row.job_id),
            config=long_values[row.id].values["config"] or {},
            prompt_ids=long_values[row.id].values["prompt_ids"],
            truncated=long_values[row.id].truncated,
        )
        for row in rows
    ]
