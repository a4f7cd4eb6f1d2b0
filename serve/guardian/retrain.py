"""The routes /v1/retrain: retrain the model of a repository, and control the plan that does it."""

import asyncio
import re
from pathlib import Path
from typing import Annotated, Any, Self

from fastapi import APIRouter, Query
from pydantic import BaseModel, ConfigDict, Field, model_validator
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import NotFound
from cluster.ownership import Principal
from cluster.times import UtcTime
from jobs import queue
from jobs.states import State
from jobs.tables import Job
from pipelines.guardian import repositories, watch_repo
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.git import repo as git_repo
from pipelines.guardian.policy import Decision
from pipelines.guardian.repositories import RETRAIN_KIND, Repository, RepositoryRequest
from pipelines.guardian.retrain import estimates
from pipelines.guardian.retrain import job as retrain_job
from pipelines.guardian.retrain.estimates import Step
from pipelines.guardian.retrain.job import RetrainSpec
from serve.guardian.repositories import FolderPath
from serve.jobs.routes import JobId
from serve.security.callers import AdminCaller

router = APIRouter(prefix="/v1/retrain")


class PlanNotFound(NotFound):
    """There is no such plan."""

    code = "PLAN_NOT_FOUND"


class RetrainRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    project_path: str = Field(
        default=".",
        min_length=1,
        max_length=1000,
        description="A repository in a folder of guardian.roots. If it is not registered yet, it is registered by the "
        "name of its folder.",
    )
    repository: str | None = Field(
        default=None, min_length=1, max_length=100, description="A registered repository instead, by its id or name."
    )
    auto_deploy: bool = Field(
        default=True, description="Serve the new version if it is better. If not sent, the repository decides."
    )
    force: bool = Field(default=False, description="Retrain whatever the policy says.")

    @model_validator(mode="after")
    def validate_exactly_one(self) -> Self:
        if self.repository is not None and "project_path" in self.model_fields_set:
            raise ValueError("send either project_path or repository, not both")
        return self


class Plan(BaseModel):
    plan: list[Step]
    estimated_duration_minutes: float


class RetrainResponse(BaseModel):
    triggered: bool
    reason: str
    plan: Plan = Field(description="The steps that are done, or would be done.")
    job_id: str | None = Field(description="The job of the plan. Null: there is none, for that reason.")


class StepView(Step):
    state: State | None = Field(description="Null: not reached yet, or skipped.")
    progress: float | None
    job_id: str | None


class PlanView(BaseModel):
    job_id: str
    status: State
    phase: str | None
    progress: float
    repository_id: str | None
    model: str | None = Field(description="Null: the plan has not started yet.")
    commit: str | None
    plan: list[StepView]
    promoted: bool | None = Field(description="Whether the new version is better. Null: not known yet.")
    reason: str | None = Field(description="Why the new version is, or is not, promoted.")
    comparison: dict[str, Any] | None = Field(description="Comparison of the new version with the served one.")
    error: str | None
    created_at: UtcTime
    updated_at: UtcTime


@router.post("")
async def trigger_retraining(body: RetrainRequest, caller: AdminCaller) -> RetrainResponse:
    """Retrain the model of a repository, if its policy says so or `force` is set. It has one plan at a time."""
    repository = await _find_or_register_repository(body, caller)
    deploy = body.auto_deploy if "auto_deploy" in body.model_fields_set else repository.auto_deploy
    spec = RetrainSpec(repository_id=repository.id, force=body.force, auto_deploy=deploy)
    async with get_database().read_transaction() as session:
        unfinished = await retrain_job.find_unfinished(session, spec)
        new_feedback = await feedback_store.count_new(session, repository.model)
    reason, should_retrain = "it is forced", True
    if unfinished is None and not body.force:
        state = await asyncio.to_thread(watch_repo.evaluate_repository, repository, new_feedback)
        reason, should_retrain = state.decision.reason, state.decision.should_retrain
        spec = spec.model_copy(update={"commit": state.commit})
    async with get_database().transaction() as session:
        job, is_new = await retrain_job.get_or_enqueue(session, spec, caller) if should_retrain else (None, False)
        plan = await _estimate_plan(session, repository, deploy)
    if job is not None and not is_new:
        reason = f"{job.id} is not finished yet"
    return RetrainResponse(triggered=job is not None, reason=reason, plan=plan, job_id=job.id if job else None)


@router.get("/monitor")
async def monitor_repository(
    caller: AdminCaller,
    project_path: Annotated[FolderPath, Query(description="A folder in one of guardian.roots.")] = ".",
) -> Decision:
    """Check a repository for changes since its last training. Nothing is trained."""
    folder = await asyncio.to_thread(git_repo.validate_path, project_path)
    async with get_database().read_transaction() as session:
        repository = await repositories.find_by_path(session, folder)
        new_feedback = await feedback_store.count_new(session, repository.model) if repository else 0
    if repository is not None:
        return (await asyncio.to_thread(watch_repo.evaluate_repository, repository, new_feedback)).decision
    return await asyncio.to_thread(watch_repo.evaluate_folder, folder)


@router.get("/{job_id}")
async def show_plan(job_id: JobId, caller: AdminCaller) -> PlanView:
    """Get the progress of a plan, step by step, and its result."""
    async with get_database().read_transaction() as session:
        return await _view(session, await _find(session, job_id, caller))


@router.post("/{job_id}/pause")
async def pause_plan(job_id: JobId, caller: AdminCaller) -> PlanView:
    """Pause a plan: between two steps at once, within a step at its next checkpoint."""
    return await _change(queue.pause, job_id, caller)


@router.post("/{job_id}/resume")
async def resume_plan(job_id: JobId, caller: AdminCaller) -> PlanView:
    """Resume a paused plan."""
    return await _change(queue.resume, job_id, caller)


async def _find_or_register_repository(body: RetrainRequest, caller: Principal) -> Repository:
    """The repository that the request names. A folder that is not registered yet is registered."""
    if body.repository is not None:
        async with get_database().read_transaction() as session:
            return await repositories.find(session, body.repository)
    folder = await asyncio.to_thread(git_repo.validate_path, body.project_path)
    async with get_database().transaction() as session:
        if existing := await repositories.find_by_path(session, folder):
            return existing
        registration = RepositoryRequest(name=_name_from_folder(folder), path=str(folder), auto_deploy=body.auto_deploy)
        return await repositories.create(session, registration, caller)


def _name_from_folder(folder: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._")[:100] or "repository"


async def _estimate_plan(session: AsyncSession, repository: Repository, deploy: bool) -> Plan:
    has_feedback = await feedback_store.has_learned(session, repository.model)
    steps = await estimates.estimate_steps(
        session, retrain_job.steps_of(repository=True, feedback=has_feedback, deploy=deploy)
    )
    return Plan(plan=steps, estimated_duration_minutes=_total_minutes(steps))


def _total_minutes(steps: list[Step]) -> float:
    return round(sum(step.estimated_minutes for step in steps), 2)


async def _find(session: AsyncSession, job_id: str, caller: Principal, *, lock: bool = False) -> Job:
    job = await queue.get(session, job_id, caller, lock=lock)
    if job.kind != RETRAIN_KIND:
        raise PlanNotFound(f"{job_id} is a job of the kind '{job.kind}', not a plan.")
    return job


async def _change(action: Any, job_id: str, caller: Principal) -> PlanView:
    async with get_database().transaction() as session:
        job = await _find(session, job_id, caller, lock=True)
        await action(session, job)
        await session.flush()
        return await _view(session, job)


async def _view(session: AsyncSession, job: Job) -> PlanView:
    children = await session.scalars(select(Job).where(Job.parent_id == job.id))
    by_step = {child.child_name: child for child in children}
    plan_state: dict[str, Any] = job.checkpoint or {}
    deploy = plan_state.get("auto_deploy", job.spec["auto_deploy"])
    steps = await estimates.estimate_steps(
        session,
        retrain_job.steps_of(
            repository=job.spec["repository_id"] is not None,
            feedback=plan_state.get("feedback", job.spec["feedback"] is not None),
            deploy=deploy is not False,
        ),
    )
    compare_job = by_step.get("compare")
    comparison: dict[str, Any] = (compare_job.result if compare_job else None) or {}
    return PlanView(
        job_id=job.id,
        status=State(job.state),
        phase=job.phase,
        progress=job.progress,
        repository_id=job.spec["repository_id"],
        model=plan_state.get("model"),
        commit=plan_state.get("commit"),
        plan=[_step_view(step, by_step.get(step.name)) for step in steps],
        promoted=comparison.get("promoted"),
        reason=comparison.get("reason"),
        comparison=comparison or None,
        error=job.error["message"] if job.error else None,
        created_at=job.created_at,
        updated_at=job.updated_at,
    )


def _step_view(step: Step, child: Job | None) -> StepView:
    fields: dict[str, Any] = {"state": None, "progress": None, "job_id": None}
    if child is not None:
        fields = {"state": State(child.state), "progress": child.progress, "job_id": child.id}
    return StepView(**dict(step), **fields)
