"""The routes /v1/fine-tune, /status, /validate and /deploy: from data to a served model, step by step."""

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import advisory_lock, get_database
from cluster.errors import NotFound
from cluster.ownership import Principal
from jobs import queue
from jobs.outputs import OutputMissing
from jobs.queue import JobRequest
from jobs.states import FINISHED, RETRYABLE, State
from jobs.tables import Job
from pipelines.training import progress
from pipelines.training.data import resolution
from pipelines.training.spec import DeploySpec, ExportSpec, ValidateSpec
from serve.forge.schemas import (
    DeploymentView,
    FineTuneRequest,
    JobSubmitted,
    NoTrainingData,
    StatusView,
    ValidationView,
)
from serve.forge.steps import find_or_start_deployment, find_or_start_step
from serve.http.job_wait import UNFINISHED_RESPONSE, WaitSeconds, wait_for_job
from serve.jobs.routes import JobId
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter()
openai_router = APIRouter(prefix="/v1")


class TrainingNotFound(NotFound):
    """There is no such fine-tuning job."""

    code = "TRAINING_NOT_FOUND"


@openai_router.post("/fine-tune")
async def fine_tune(
    body: FineTuneRequest,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> JobSubmitted:
    """Queue a fine-tuning job."""
    if body.data is None:
        raise NoTrainingData
    job_request = JobRequest(kind="fine_tune", spec=body.model_dump(mode="json"))
    async with get_database().transaction() as session:
        for data in (body.data, body.validation):
            if data is not None:
                await resolution.require_usable(session, data, caller, body.method)
        job = await queue.enqueue(session, job_request, caller, idempotency_key=idempotency_key)
        return JobSubmitted(job_id=job.id, status="queued", message="Fine-tuning job queued")


@router.get("/status/{job_id}")
async def status(job_id: JobId, caller: CurrentCaller) -> StatusView:
    """Get the progress of a fine_tune or forge job."""
    async with get_database().read_transaction() as session:
        job = await _find_training(session, job_id, caller)
        current = await progress.get_progress(session, job)
    return StatusView(
        job_id=job.id,
        error=job.error["message"] if job.error else None,
        created_at=job.created_at,
        updated_at=job.updated_at,
        **dict(current),
    )


@router.post("/validate/{job_id}", responses=UNFINISHED_RESPONSE)
async def validate(
    job_id: JobId, caller: CurrentCaller, request: Request, response: Response, wait: WaitSeconds = 60
) -> ValidationView:
    """Measure a trained model on its held-out split. It is measured once; later requests get the same result."""
    async with get_database().transaction() as session:
        training = await _lock_fine_tune_job(session, job_id, caller)
        validate_spec = ValidateSpec(job_id=training.id)
        # A validation of the export measures the trained model, too.
        job = await find_or_start_step(
            session, training, "validate", validate_spec, caller, ignored_fields={"export_job_id"}
        )
    job = await wait_for_job(request, job.id, wait)
    response.status_code = 200 if job.state in FINISHED else 202
    result: dict[str, Any] = job.result or {}
    failure = [job.error["message"]] if job.error else []
    return ValidationView(
        job_id=job_id,
        passed=result.get("passed"),
        metrics=result.get("metrics", {}),
        report_path=result.get("report_path"),
        reasons=result.get("reasons", failure),
        validation_job_id=job.id,
    )


@router.post("/deploy/{job_id}", responses=UNFINISHED_RESPONSE)
async def deploy(
    job_id: JobId,
    caller: AdminCaller,
    request: Request,
    response: Response,
    force: Annotated[bool, Query(description="Deploy even if the validation does not pass.")] = False,
    wait: WaitSeconds = 60,
) -> DeploymentView:
    """Export a trained model, validate the export, and serve it as NAME:latest. Completed steps are not repeated."""
    async with get_database().transaction() as session:
        training = await _lock_fine_tune_job(session, job_id, caller)
        export = await find_or_start_step(session, training, "export", ExportSpec(job_id=training.id), caller)
        validate_spec = ValidateSpec(job_id=training.id, export_job_id=export.id)
        validation = await find_or_start_step(session, training, "validate", validate_spec, caller, depends_on=export)
        deploy_spec = DeploySpec(export_job_id=export.id, force=force)
        job = await find_or_start_deployment(session, deploy_spec, caller, depends_on=validation)
    job = await wait_for_job(request, job.id, wait)
    response.status_code = 200 if job.state in FINISHED else 202
    result: dict[str, Any] = job.result or {}
    return DeploymentView(
        job_id=job_id,
        success=job.state == State.SUCCEEDED if job.state in FINISHED else None,
        model_name=result.get("model_name"),
        gguf_path=result.get("gguf_path"),
        message=job.error["message"] if job.error else None,
        deployment_job_id=job.id,
    )


async def _find_training(session: AsyncSession, job_id: str, caller: Principal) -> Job:
    job = await queue.get(session, job_id, caller)
    if job.kind not in progress.TRAINING_KINDS:
        raise TrainingNotFound(f"{job_id} is a job of the kind '{job.kind}', not a training.")
    return job


async def _lock_fine_tune_job(session: AsyncSession, job_id: str, caller: Principal) -> Job:
    """Find the fine_tune job, and lock it against a second request for its steps.

    A forge job without a fine_tune job yet is returned itself.
    """
    job = await _find_training(session, job_id, caller)
    if job.kind == "forge":
        child = await session.scalar(select(Job).where(Job.parent_id == job.id, Job.kind == "fine_tune"))
        job = child or job
    if job.state in RETRYABLE:
        raise OutputMissing(f"{job.id} is {job.state}, so there is no model for this step. Retry it first.")
    # Two concurrent requests would both find no job for a step, and queue two.
    await advisory_lock(session, f"steps {job.id}")
    return job
