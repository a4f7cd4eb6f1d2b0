"""/v1/retrain: have the model of a repository trained again, and follow, hold and resume the plan that does it."""

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
from cluster.times import UtcTime
from jobs import queue
from jobs.states import State
from jobs.tables import Job
from pipelines.guardian import repositories, watch_repo
from pipelines.guardian.feedback import store as feedback_store
from pipelines.guardian.git import repo as git_repo
from pipelines.guardian.policy import Decision
from pipelines.guardian.repositories import RETRAIN, Repository, RepositoryRequest
from pipelines.guardian.retrain import estimates
from pipelines.guardian.retrain import job as retrain_job
from pipelines.guardian.retrain.estimates import Step
from pipelines.guardian.retrain.job import RetrainSpec
from serve.guardian.repositories import FolderPath
from serve.http.errors import OPENAI_ERROR_RESPONSES
from serve.jobs.routes import JobId
from serve.security.callers import AdminCaller, Caller, owner_of

router = APIRouter(prefix="/v1/retrain", tags=["Guardian"], responses=OPENAI_ERROR_RESPONSES)


class PlanNotFound(NotFound):
    """There is no such plan."""

    code = "PLAN_NOT_FOUND"


class RetrainRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    project_path: str = Field(
        default=".",
        min_length=1,
        max_length=1000,
        description="A repository in a folder of guardian.roots. One that is not registered yet is, by its folder's "
        "name.",
    )
    repository: str | None = Field(
        default=None, min_length=1, max_length=100, description="A registered one instead, by its id or name."
    )
    auto_deploy: bool = Field(
        default=True, description="Serve the new version, if it is better. Not sent: as the repository says."
    )
    force: bool = Field(default=False, description="Whatever its policy says.")

    @model_validator(mode="after")
    def say_one(self) -> Self:
        if self.repository is not None and "project_path" in self.model_fields_set:
            raise ValueError("say which by project_path or by repository, not by both")
        return self


class Plan(BaseModel):
    plan: list[Step]
    estimated_duration_minutes: float


class Triggered(BaseModel):
    triggered: bool
    reason: str
    plan: Plan = Field(description="What is done, or would be.")
    job_id: str | None = Field(description="The plan. Null: there is none, for that reason.")


class StepView(Step):
    state: State | None = Field(description="Null: the plan has not come to it, or has left it out.")
    progress: float | None
    job_id: str | None


class PlanView(BaseModel):
    job_id: str
    status: State
    phase: str | None
    progress: float
    repository_id: str | None
    model: str | None = Field(description="Null: the plan has not set out yet.")
    commit: str | None
    plan: list[StepView]
    promoted: bool | None = Field(description="Whether the new version is better. Null: not known yet.")
    reason: str | None = Field(description="Why it is, or is not, promoted.")
    comparison: dict[str, Any] | None = Field(description="How it did beside the version that is served.")
    error: str | None
    created_at: UtcTime
    updated_at: UtcTime


@router.post("")
async def trigger_retraining(wanted: RetrainRequest, caller: AdminCaller) -> Triggered:
    """Train the model of a repository again, if its policy says so or it is forced. There is one plan at a time."""
    repository = await _repository(wanted, caller)
    deploy = wanted.auto_deploy if "auto_deploy" in wanted.model_fields_set else repository.auto_deploy
    spec = RetrainSpec(repository_id=repository.id, force=wanted.force, auto_deploy=deploy)
    async with get_database().reading() as session:
        known = await retrain_job.unfinished(session, spec)
        new_feedback = await feedback_store.count_new(session, repository.model)
    reason, should = "it is forced", True
    if known is None and not wanted.force:
        look = await asyncio.to_thread(watch_repo.look, repository, new_feedback)
        reason, should = look.decision.reason, look.decision.should_retrain
        spec = spec.model_copy(update={"commit": look.commit})
    async with get_database().transaction() as session:
        job, is_new = await retrain_job.ask(session, spec, owner_of(caller)) if should else (None, False)
        plan = await _plan(session, repository, deploy)
    if job is not None and not is_new:
        reason = f"{job.id} is under way"
    return Triggered(triggered=job is not None, reason=reason, plan=plan, job_id=job.id if job else None)


@router.get("/monitor")
async def monitor_repository(
    caller: AdminCaller,
    project_path: Annotated[FolderPath, Query(description="A folder in one of guardian.roots.")] = ".",
) -> Decision:
    """Check a repository for changes since it was learned from. Nothing is trained."""
    folder = await asyncio.to_thread(git_repo.checked_path, project_path)
    async with get_database().reading() as session:
        known = await repositories.at_path(session, folder)
        new_feedback = await feedback_store.count_new(session, known.model) if known else 0
    if known is not None:
        return (await asyncio.to_thread(watch_repo.look, known, new_feedback)).decision
    return await asyncio.to_thread(watch_repo.look_at, folder)


@router.get("/{job_id}")
async def show_plan(job_id: JobId, caller: AdminCaller) -> PlanView:
    """How far a plan is, step by step, and what came of it."""
    async with get_database().reading() as session:
        return await _view(session, await _find(session, job_id, caller))


@router.post("/{job_id}/pause")
async def pause_plan(job_id: JobId, caller: AdminCaller) -> PlanView:
    """Hold a plan: at once between two steps, and within one at its next checkpoint."""
    return await _change(queue.pause, job_id, caller)


@router.post("/{job_id}/resume")
async def resume_plan(job_id: JobId, caller: AdminCaller) -> PlanView:
    """Let a plan go on from where it was held."""
    return await _change(queue.resume, job_id, caller)


async def _repository(wanted: RetrainRequest, caller: Caller) -> Repository:
    """The one that is meant; a folder that is not registered yet is from now on."""
    if wanted.repository is not None:
        async with get_database().reading() as session:
            return await repositories.find(session, wanted.repository)
    folder = await asyncio.to_thread(git_repo.checked_path, wanted.project_path)
    async with get_database().transaction() as session:
        if known := await repositories.at_path(session, folder):
            return known
        request = RepositoryRequest(name=_name(folder), path=str(folder), auto_deploy=wanted.auto_deploy)
        return await repositories.create(session, request, owner_of(caller))


def _name(folder: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", folder.name.lower()).strip("-._")[:100] or "repository"


async def _plan(session: AsyncSession, repository: Repository, deploy: bool) -> Plan:
    learned = await feedback_store.was_learned(session, repository.model)
    steps = await estimates.of(session, retrain_job.steps_of(repository=True, feedback=learned, deploy=deploy))
    return Plan(plan=steps, estimated_duration_minutes=_sum(steps))


def _sum(steps: list[Step]) -> float:
    return round(sum(step.estimated_minutes for step in steps), 2)


async def _find(session: AsyncSession, job_id: str, caller: Caller, *, lock: bool = False) -> Job:
    job = await queue.get(session, job_id, owner_of(caller), lock=lock)
    if job.kind != RETRAIN:
        raise PlanNotFound(f"{job_id} is a job of the kind '{job.kind}', not a plan.")
    return job


async def _change(action: Any, job_id: str, caller: Caller) -> PlanView:
    async with get_database().transaction() as session:
        job = await _find(session, job_id, caller, lock=True)
        await action(session, job)
        await session.flush()
        return await _view(session, job)


async def _view(session: AsyncSession, job: Job) -> PlanView:
    children = await session.scalars(select(Job).where(Job.parent_id == job.id))
    by_step = {child.child_name: child for child in children}
    outset: dict[str, Any] = job.checkpoint or {}
    deploy = outset.get("auto_deploy", job.spec["auto_deploy"])
    steps = await estimates.of(
        session,
        retrain_job.steps_of(
            repository=job.spec["repository_id"] is not None,
            feedback=outset.get("feedback", job.spec["feedback"] is not None),
            deploy=deploy is not False,
        ),
    )
    compared = by_step.get("compare")
    comparison: dict[str, Any] = (compared.result if compared else None) or {}
    return PlanView(
        job_id=job.id,
        status=State(job.state),
        phase=job.phase,
        progress=job.progress,
        repository_id=job.spec["repository_id"],
        model=outset.get("model"),
        commit=outset.get("commit"),
        plan=[_step(step, by_step.get(step.name)) for step in steps],
        promoted=comparison.get("promoted"),
        reason=comparison.get("reason"),
        comparison=comparison or None,
        error=job.error["message"] if job.error else None,
        created_at=job.created_at,
        updated_at=job.updated_at,
    )


def _step(step: Step, child: Job | None) -> StepView:
    facts: dict[str, Any] = {"state": None, "progress": None, "job_id": None}
    if child is not None:
        facts = {"state": State(child.state), "progress": child.progress, "job_id": child.id}
    return StepView(**dict(step), **facts)
