"""Read the outputs of earlier jobs, for jobs that continue from them."""

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import identity
from cluster.db import Database, run_with_database
from cluster.errors import Conflict
from cluster.ownership import LOCAL, Principal
from jobs import queue
from jobs.states import State
from jobs.tables import Job


class OutputMissing(Conflict):
    """The job has no output to continue from."""

    code = "JOB_HAS_NO_RESULT"


@dataclass(frozen=True)
class JobOutput:
    job_id: str
    spec: dict[str, Any]
    result: dict[str, Any]
    finished_at: datetime
    owner_id: str | None  # of the job


def get_output(job_id: str, kind: str, owner_id: str | None) -> JobOutput:
    """Return the output of a job of this kind, or of the child of this kind of a forge job.

    The job must be visible to the account `owner_id`. None: the platform, which may see all jobs.
    """
    return run_with_database(lambda database: _get_output(database, job_id, kind, owner_id))


async def find_output(session: AsyncSession, job_id: str, kind: str, principal: Principal) -> JobOutput:
    """Do the same as `get_output`, in the caller's transaction."""
    job = await queue.get(session, job_id, principal)
    if job.kind == "forge":
        child = await session.scalar(select(Job).where(Job.parent_id == job.id, Job.kind == kind))
        if child is None:
            raise OutputMissing(f"The forge job {job_id} has no child of the kind '{kind}' yet.")
        job = child
    if job.kind != kind:
        raise OutputMissing(f"{job_id} is a job of the kind '{job.kind}', not '{kind}' or 'forge'.")
    if job.state != State.SUCCEEDED:
        raise OutputMissing(f"{job.id} is {job.state}; only a job that succeeded has an output to continue from.")
    assert isinstance(job.result, dict)
    assert job.finished_at is not None
    return JobOutput(job.id, job.spec, job.result, job.finished_at, job.owner_id)


def own_job(job_id: str) -> Job:
    """Return the current row of the running job itself."""
    return run_with_database(lambda database: _get_job(database, job_id))


def is_admin(owner_id: str | None) -> bool:
    """Return whether the account has the rights of an administrator now. None: the platform, which has them."""
    return find_owner(owner_id).is_admin


def find_owner(owner_id: str | None) -> Principal:
    """Return the owner of a job, with the rights that the account has now. None: the platform."""
    return run_with_database(lambda database: _find_principal(database, owner_id))


async def _find_principal(database: Database, owner_id: str | None) -> Principal:
    async with database.read_transaction() as session:
        return await identity.find_principal(session, owner_id)


async def _get_output(database: Database, job_id: str, kind: str, owner_id: str | None) -> JobOutput:
    async with database.read_transaction() as session:
        return await find_output(session, job_id, kind, await identity.find_principal(session, owner_id))


async def _get_job(database: Database, job_id: str) -> Job:
    async with database.read_transaction() as session:
        return await queue.get(session, job_id, LOCAL)
