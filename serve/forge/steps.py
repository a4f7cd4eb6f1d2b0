"""Finds or queues the steps of a forge job (export, validation, deployment) one by one."""

from collections.abc import Set
from typing import Literal

from pydantic import BaseModel
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.identity import User
from cluster.ownership import Principal
from jobs import queue
from jobs.queue import JobRequest
from jobs.registry import Resources
from jobs.states import FINISHED, RETRYABLE, State
from jobs.tables import Job
from pipelines.training.forge import resources_of
from pipelines.training.spec import DeploySpec, FineTuneSpec


async def find_or_start_step(
    session: AsyncSession,
    training: Job,
    kind: Literal["export", "validate"],
    spec: BaseModel,
    caller: Principal,
    *,
    depends_on: Job | None = None,
    ignored_fields: Set[str] = frozenset(),
) -> Job:
    """The job for a step of a training: one that has succeeded or is unfinished, otherwise a new one.

    An unfinished job of another owner counts only if that owner may see the training: otherwise it will fail.
    """
    administrators = select(User.id).where(User.role == "admin")
    is_entitled = or_(
        Job.owner_id.is_(None),
        Job.owner_id == training.owner_id,
        Job.owner_id.in_(administrators),
    )
    candidates = await session.scalars(
        select(Job)
        .where(Job.kind == kind, Job.state.not_in(RETRYABLE), Job.spec["job_id"].as_string() == training.id)
        .where(or_(Job.state == State.SUCCEEDED, is_entitled))
        .order_by(Job.created_at.desc())
    )
    spec_values = spec.model_dump(mode="json")
    for job in candidates:
        if job.spec.keys() == spec_values.keys() and all(
            job.spec[name] == spec_values[name] for name in spec_values.keys() - ignored_fields
        ):
            return job
    resources = resources_of(kind, FineTuneSpec.model_construct(**training.spec))
    return await _enqueue_step(session, kind, spec, caller, depends_on=depends_on or training, resources=resources)


async def find_or_start_deployment(session: AsyncSession, spec: DeploySpec, caller: Principal, depends_on: Job) -> Job:
    """The unfinished deployment, otherwise a new one. After a finished one, another version may have been deployed."""
    query = select(Job).where(
        Job.kind == "deploy",
        Job.state.not_in(FINISHED),
        Job.spec["export_job_id"].as_string() == spec.export_job_id,
    )
    for job in await session.scalars(query):
        if job.spec == spec.model_dump(mode="json"):
            return job
    return await _enqueue_step(session, "deploy", spec, caller, depends_on)


async def _enqueue_step(
    session: AsyncSession,
    kind: str,
    spec: BaseModel,
    caller: Principal,
    depends_on: Job,
    resources: Resources | None = None,
) -> Job:
    job_request = JobRequest(kind=kind, spec=spec.model_dump(mode="json"), depends_on=[depends_on.id])
    return await queue.enqueue(session, job_request, caller, resources=resources)
