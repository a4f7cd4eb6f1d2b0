"""Steps of a forge job that can be asked for one by one."""

from collections.abc import Set
from typing import Literal

from pydantic import BaseModel
from sqlalchemy import or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.identity import User
from jobs import queue
from jobs.queue import JobRequest
from jobs.registry import Resources
from jobs.states import FINISHED, RETRYABLE, State
from jobs.tables import Job
from pipelines.training.forge import resources_of
from pipelines.training.spec import DeploySpec, FineTuneSpec
from serve.security.callers import Caller, owner_of


async def find_or_start_step(
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


async def find_or_start_deployment(session: AsyncSession, spec: DeploySpec, caller: Caller, after: Job) -> Job:
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
