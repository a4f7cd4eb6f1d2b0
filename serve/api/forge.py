"""/v1/fine-tune, /status, /validate and /deploy: from data to a served model, step by step."""

from collections.abc import Set
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response
from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database, one_at_a_time
from cluster.errors import Forbidden, InvalidRequest, NotFound
from cluster.identity import User
from cluster.times import UtcTime
from jobs import queue
from jobs.queue import JobRequest
from jobs.registry import Resources
from jobs.states import FINISHED, RETRYABLE, State
from jobs.tables import Job
from pipelines.training import datasets, progress
from pipelines.training.forge import resources_of
from pipelines.training.results import NotMade
from pipelines.training.spec import Data, DeploySpec, ExportSpec, FineTuneSpec, ModelName, ValidateSpec
from serve.api.jobs import JobId, owner_of
from serve.auth import Caller, CurrentCaller
from serve.envelope import ERROR_RESPONSES, OPENAI_ERROR_RESPONSES
from serve.outcomes import UNFINISHED, Wait, outcome_of

router = APIRouter(tags=["Forge"], responses=ERROR_RESPONSES)
openai_router = APIRouter(prefix="/v1", tags=["Forge"], responses=OPENAI_ERROR_RESPONSES)


class NoData(InvalidRequest):
    """Say what to train on: data with one of dataset, prompts (by ids, tags or category) or folder."""

    code = "NO_TRAINING_DATA"


class TrainingNotFound(NotFound):
    """There is no such fine-tuning job."""

    code = "TRAINING_NOT_FOUND"


def _require_data(schema: dict[str, Any]) -> None:
    """It has a default only so that its absence can be answered in words of our own."""
    schema["required"] = [*schema["required"], "data"]
    del schema["properties"]["data"]["default"]


class FineTuneRequest(FineTuneSpec):
    model_config = ConfigDict(strict=True, json_schema_extra=_require_data)

    name: ModelName = Field(alias="project_name")
    pissa: bool = Field(default=False, alias="use_pissa")
    data: Data | SkipJsonSchema[None] = Field(  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]
        default=None, description="What to train on: exactly one of dataset, prompts and folder."
    )


class Submitted(BaseModel):
    job_id: str
    status: progress.Status
    message: str


class StatusView(progress.Progress):
    job_id: str
    error: str | None
    created_at: UtcTime
    updated_at: UtcTime


class ValidationView(BaseModel):
    job_id: str
    passed: bool | None = Field(description="Null: not known yet, or the validation failed; see its job.")
    metrics: dict[str, float | None]
    report_path: str | None
    reasons: list[str] = Field(description="Why it did not pass.")
    validation_job_id: str


class DeploymentView(BaseModel):
    job_id: str
    success: bool | None = Field(description="Null: not known yet.")
    model_name: str | None
    gguf_path: str | None
    message: str | None = Field(description="Why it was not deployed.")
    deployment_job_id: str


@openai_router.post("/fine-tune")
async def fine_tune(
    wanted: FineTuneRequest,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> Submitted:
    """Queue a fine-tuning job."""
    if wanted.data is None:
        raise NoData
    request = JobRequest(kind="fine_tune", spec=wanted.model_dump(mode="json"))
    async with get_database().transaction() as session:
        for data in (wanted.data, wanted.validation):
            if data is not None:
                await datasets.check(session, data, owner_of(caller), wanted.method)
        job = await queue.enqueue(session, request, owner_of(caller), idempotency_key=idempotency_key)
        return Submitted(job_id=job.id, status="queued", message="Fine-tuning job queued")


@router.get("/status/{job_id}")
async def status(job_id: JobId, caller: CurrentCaller) -> StatusView:
    """How far a fine_tune or forge job is."""
    async with get_database().reading() as session:
        job = await _training(session, job_id, caller)
        found = await progress.of(session, job)
    return StatusView(
        job_id=job.id,
        error=job.error["message"] if job.error else None,
        created_at=job.created_at,
        updated_at=job.updated_at,
        **dict(found),
    )


@router.post("/validate/{job_id}", responses=UNFINISHED)
async def validate(
    job_id: JobId, caller: CurrentCaller, request: Request, response: Response, wait: Wait = 60
) -> ValidationView:
    """Measure a trained model on the samples that were held out, once; the same again answers what was found."""
    async with get_database().transaction() as session:
        training = await _trained(session, job_id, caller)
        check = ValidateSpec(job_id=training.id)
        # One that has measured the export too, has measured this.
        job = await _step(session, training, "validate", check, caller, but={"export_job_id"})
    job = await outcome_of(request, job.id, wait)
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


@router.post("/deploy/{job_id}", responses=UNFINISHED)
async def deploy(
    job_id: JobId,
    caller: CurrentCaller,
    request: Request,
    response: Response,
    force: Annotated[bool, Query(description="Even when it does not pass its validation.")] = False,
    wait: Wait = 60,
) -> DeploymentView:
    """Export a trained model, validate the export, and serve it as NAME:latest. What is done already stays done."""
    if not caller.is_admin:
        raise Forbidden("Only an administrator may deploy.")
    async with get_database().transaction() as session:
        training = await _trained(session, job_id, caller)
        export = await _step(session, training, "export", ExportSpec(job_id=training.id), caller)
        check = ValidateSpec(job_id=training.id, export_job_id=export.id)
        validation = await _step(session, training, "validate", check, caller, after=export)
        target = DeploySpec(export_job_id=export.id, force=force)
        job = await _deployment(session, target, caller, after=validation)
    job = await outcome_of(request, job.id, wait)
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


async def _training(session: AsyncSession, job_id: str, caller: Caller) -> Job:
    job = await queue.get(session, job_id, owner_of(caller))
    if job.kind not in progress.KINDS:
        raise TrainingNotFound(f"{job_id} is a job of the kind '{job.kind}'; it trains nothing.")
    return job


async def _trained(session: AsyncSession, job_id: str, caller: Caller) -> Job:
    """The fine_tune job whose model is meant, to queue steps for; a forge job that has none yet stands for it."""
    job = await _training(session, job_id, caller)
    if job.kind == "forge":
        child = await session.scalar(select(Job).where(Job.parent_id == job.id, Job.kind == "fine_tune"))
        job = child or job
    if job.state in RETRYABLE:
        raise NotMade(f"{job.id} is {job.state}, so there is no model to go on from; retry it first.")
    # Two who ask at once would both find that a step is missing.
    await one_at_a_time(session, f"steps {job.id}")
    return job


async def _step(
    session: AsyncSession,
    training: Job,
    kind: Literal["export", "validate"],
    spec: BaseModel,
    caller: Caller,
    *,
    after: Job | None = None,
    but: Set[str] = frozenset(),
) -> Job:
    """The job that does this for a training: the one that has done it or will, else a new one.

    What somebody else has queued for it counts only if they may do so: else it will fail.
    """
    administrators = select(User.id).where(User.role == "admin")
    entitled = or_(
        Job.owner_id.is_(None),
        Job.owner_id == training.owner_id,
        Job.owner_id.in_(administrators),
    )
    known = await session.scalars(
        select(Job)
        .where(Job.kind == kind, Job.state.not_in(RETRYABLE), Job.spec["job_id"].as_string() == training.id)
        .where(or_(Job.state == State.SUCCEEDED, entitled))
        .order_by(Job.created_at.desc())
    )
    wanted = spec.model_dump(mode="json")
    for job in known:
        if job.spec.keys() == wanted.keys() and all(job.spec[name] == wanted[name] for name in wanted.keys() - but):
            return job
    resources = resources_of(kind, FineTuneSpec.model_construct(**training.spec))
    return await _new_step(session, kind, spec, caller, after=after or training, resources=resources)


async def _deployment(session: AsyncSession, spec: DeploySpec, caller: Caller, after: Job) -> Job:
    """The deployment that is under way, else a new one: since an earlier one, something else may have been deployed."""
    under_way = select(Job).where(
        Job.kind == "deploy",
        Job.state.not_in(FINISHED),
        Job.spec["export_job_id"].as_string() == spec.export_job_id,
    )
    for job in await session.scalars(under_way):
        if job.spec == spec.model_dump(mode="json"):
            return job
    return await _new_step(session, "deploy", spec, caller, after)


async def _new_step(
    session: AsyncSession,
    kind: str,
    spec: BaseModel,
    caller: Caller,
    after: Job,
    resources: Resources | None = None,
) -> Job:
    request = JobRequest(kind=kind, spec=spec.model_dump(mode="json"), depends_on=[after.id], resources=resources)
    return await queue.enqueue(session, request, owner_of(caller))
