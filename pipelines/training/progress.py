"""How far a training is, as people ask for it."""

import math
from typing import Any, Literal

from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from jobs import journal
from jobs.states import State
from jobs.tables import Job
from pipelines.training.forge import PROGRESS_RANGES

Status = Literal[
    "queued",
    "preparing",
    "training",
    "exporting",
    "validating",
    "deploying",
    "paused",
    "completed",
    "failed",
    "cancelled",
]

TRAINING_KINDS = ("fine_tune", "forge")
_STATUS_BY_STATE: dict[str, Status] = {
    State.PAUSED: "paused",
    State.SUCCEEDED: "completed",
    State.FAILED: "failed",
    State.CANCELLED: "cancelled",
}
_STATUS_BY_STEP: dict[str, Status] = {"export": "exporting", "validate": "validating", "deploy": "deploying"}


class TrainingMetrics(BaseModel):
    """What is not known yet is None."""

    progress: float = Field(default=0, ge=0, le=100)
    current_epoch: int | None = None
    total_epochs: int | None = None
    current_step: int | None = None
    loss: float | None = None
    eval_loss: float | None = None
    learning_rate: float | None = None
    grad_norm: float | None = None
    tokens_per_second: float | None = None
    eta_seconds: float | None = None
    memory_mb: float | None = None
    gpu_utilization: float | None = None


class TrainingProgress(TrainingMetrics):
    status: Status


async def get_status(session: AsyncSession, job: Job) -> Status:
    """Only what is done of it now."""
    return _status(job, (await _find_steps(session, job)).get("fine_tune"))


async def get_progress(session: AsyncSession, job: Job) -> TrainingProgress:
    """The progress of a fine_tune job, or of a forge job and its fine-tune."""
    steps = await _find_steps(session, job)
    training = steps.get("fine_tune")
    metrics = await _latest_metrics(session, training) if training else {}
    epoch, epochs = metrics.pop("epoch", None), None if job.spec["max_steps"] else math.ceil(job.spec["epochs"])
    step = metrics.pop("step", None)
    return TrainingProgress(
        status=_status(job, training),
        progress=_overall_progress(job, steps),
        current_epoch=None if epoch is None else _current_epoch(epoch, epochs),
        total_epochs=epochs,
        current_step=None if step is None else int(step),
        **{name: value for name, value in metrics.items() if name in TrainingMetrics.model_fields},
    )


async def related_job_ids(session: AsyncSession, job: Job) -> list[str]:
    """The jobs whose news are news of this training: it and its steps, as far as they have begun."""
    return sorted({job.id} | {step.id for step in (await _find_steps(session, job)).values()})


async def _latest_metrics(session: AsyncSession, training: Job) -> dict[str, Any]:
    """The newest of each number."""
    metrics: dict[str, Any] = {}
    for event in await journal.newest(session, training.id, "progress", limit=20):
        metrics = {**event.data.get("metrics", {}), **metrics}
    # Between two evaluations there may be any number of steps.
    if "eval_loss" not in metrics and _was_evaluated(training.spec, metrics):
        evaluation = await journal.newest_metric(session, training.id, "eval_loss")
        metrics |= {} if evaluation is None else {"eval_loss": evaluation}
    return metrics


def _was_evaluated(spec: dict[str, Any], metrics: dict[str, Any]) -> bool:
    """Before that, nobody need look for it among all that was told."""
    if not spec["eval_split"] and not spec.get("validation"):
        return False
    interval = spec["eval_steps"]
    return metrics.get("step", 0) >= interval if interval else metrics.get("epoch", 0) >= 1


def _current_epoch(epoch: float, epochs: int | None) -> int:
    """The epoch it is in, from 1. At its very end it is still that one."""
    epoch_number = max(1, math.ceil(epoch))
    return min(epoch_number, epochs) if epochs else epoch_number


async def _find_steps(session: AsyncSession, job: Job) -> dict[str, Job]:
    """The jobs of its steps, by their kind: itself, unless it is a forge job."""
    if job.kind != "forge":
        return {job.kind: job}
    children = await session.scalars(select(Job).where(Job.parent_id == job.id))
    return {child.kind: child for child in children}


def _overall_progress(job: Job, steps: dict[str, Job]) -> float:
    """A forge job is as far as the steps that are done, and the one that is under way."""
    if job.kind != "forge" or job.state == State.SUCCEEDED:
        return job.progress
    parts = [
        begin + (end - begin) * steps[kind].progress / 100
        for kind, (begin, end) in PROGRESS_RANGES.items()
        if kind in steps
    ]
    return round(max(parts, default=0.0), 2)


def _status(job: Job, training: Job | None) -> Status:
    if job.state in _STATUS_BY_STATE:
        return _STATUS_BY_STATE[job.state]
    if job.kind == "forge" and job.phase in _STATUS_BY_STEP:
        return _STATUS_BY_STEP[job.phase]
    if training is None or training.state == State.QUEUED:
        return "queued"
    if training.state == State.PAUSED:
        return "paused"
    return "training" if training.phase in {"training", "saving the model"} else "preparing"
