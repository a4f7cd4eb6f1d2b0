"""OpenAI's names of fine-tuned models: `ft:BASE:OWNER:SUFFIX:ID`, and `…:ckpt-step-N` for checkpoints.

A name is derived from its job, and resolved by the job's id at its end. Only callers who may see the job can use it.
"""

import re
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.ownership import Principal, visible
from jobs import queue
from jobs.queue import JobNotFound
from jobs.states import State
from jobs.tables import Job
from pipelines.training import progress
from pipelines.training.data.resolution import is_path
from pipelines.training.models.versions import ModelNotFound
from serve.engines.protocol import ModelFolder

PREFIX = "ft:"
CHECKPOINT = re.compile(r":ckpt-step-(\d{1,9})\Z")
MAX_BASE_LENGTH = 120
JOB_PREFIX = "job_"


def model_name(job: Job) -> str:
    base: str = job.spec["base_model"]
    base_name = Path(base).name if is_path(base) else base
    suffix = job.spec.get("suffix") or ""
    return f"{PREFIX}{base_name[:MAX_BASE_LENGTH]}:{organization(job)}:{suffix}:{short_id(job)}"


def checkpoint_name(job: Job, step: int) -> str:
    return f"{model_name(job)}:ckpt-step-{step}"


def organization(job: Job) -> str:
    return re.sub(r"[^a-z0-9_-]+", "-", job.created_by.lower())[:40]


def short_id(job: Job) -> str:
    return job.id.removeprefix(JOB_PREFIX)


def fine_tuning_jobs(principal: Principal) -> Select[Job]:
    """The jobs that fine-tune a model, except for the children of such jobs."""
    jobs = select(Job).where(Job.kind.in_(progress.TRAINING_KINDS), Job.parent_id.is_(None))
    return visible(jobs, Job, principal)


async def find_fine_tune_job(session: AsyncSession, job: Job) -> Job | None:
    """The job itself or its fine_tune child, which has the checkpoints and metrics; None if there is no child yet."""
    if job.kind == "fine_tune":
        return job
    return await session.scalar(select(Job).where(Job.parent_id == job.id, Job.kind == "fine_tune"))


async def resolve(session: AsyncSession, reference: str, principal: Principal) -> str | ModelFolder:
    """Resolve a name to a registered version (NAME:v3), or to a folder that was never exported."""
    checkpoint = CHECKPOINT.search(reference)
    job = await _find(session, CHECKPOINT.sub("", reference), principal)
    training = await find_fine_tune_job(session, job)
    if checkpoint:
        return _checkpoint(training, int(checkpoint[1]), reference)
    if job.state != State.SUCCEEDED or training is None:
        raise ModelNotFound(f"The model '{reference}' does not exist: its job {job.id} is {job.state}.")
    if version := version_of(job):
        return "{}:v{}".format(*version)
    assert isinstance(job.result, dict)
    return ModelFolder(job.result["model"], job.result["base_model"], job.finished_at or job.created_at)


def version_of(job: Job) -> tuple[str, int] | None:
    """Name and number of the version that a succeeded job has registered; None if the job exports nothing."""
    result: Any = job.result
    return (result["name"], result["version"]) if job.kind == "forge" else None


def epochs(training: Job | None) -> list[dict[str, Any]]:
    """The stored checkpoints of a training, the oldest first."""
    state: Any = training.checkpoint if training else None
    return state.get("epochs", []) if isinstance(state, dict) else []


async def _find(session: AsyncSession, reference: str, principal: Principal) -> Job:
    try:
        job = await queue.get(session, JOB_PREFIX + reference.rpartition(":")[2], principal)
    except JobNotFound:
        job = None
    if job is None or job.kind not in progress.TRAINING_KINDS or job.parent_id or model_name(job) != reference:
        raise ModelNotFound(f"There is no model '{reference}'.")
    return job


def _checkpoint(training: Job | None, step: int, reference: str) -> ModelFolder:
    for epoch in epochs(training):
        if epoch["step"] == step:
            assert training is not None
            assert isinstance(training.checkpoint, dict)
            moment = datetime.fromisoformat(epoch["created_at"])
            return ModelFolder(epoch["address"], training.checkpoint["base_model"], moment)
    raise ModelNotFound(f"There is no model '{reference}'.")
