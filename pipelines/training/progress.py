"""The status, progress and newest metrics of a training, as the APIs show them."""

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
    """Metrics that are not known yet are None."""

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
    """Only the status, which takes fewer queries than `get_progress`."""
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
    """The ids of the jobs whose events belong to this training: its own, and those of its steps so far."""
    return sorted({job.id} | {step.id for step in (await _find_steps(session, job)).values()})


async def _latest_metrics(session: AsyncSession, training: Job) -> dict[str, Any]:
    """The newest value of each metric."""
    metrics: dict[str, Any] = {}
    for event in await journal.newest(session, training.id, "progress", limit=20):
        metrics = {**event.data.get("metrics", {}), **metrics}
    # The last evaluation may be any number of steps ago.
    if "eval_loss" not in metrics and _was_evaluated(training.spec, metrics):
        evaluation = await journal.newest_metric(session, training.id, "eval_loss")
        metrics |= {} if evaluation is None else {"eval_loss": evaluation}
    return metrics


def _was_evaluated(spec: dict[str, Any], metrics: dict[str, Any]) -> bool:
    """Whether an evaluation is to be expected in the journal. Without one, the whole journal would be searched."""
    if not spec["eval_split"] and not spec.get("validation"):
        return False
    interval = spec["eval_steps"]
    return metrics.get("step", 0) >= interval if interval else metrics.get("epoch", 0) >= 1


def _current_epoch(epoch: float, epochs: int | None) -> int:
    """The number of the current epoch, from 1. The end of an epoch still belongs to it."""
    epoch_number = max(1, math.ceil(epoch))
    return min(epoch_number, epochs) if epochs else epoch_number


async def _find_steps(session: AsyncSession, job: Job) -> dict[str, Job]:
    """The jobs of the steps by kind. A job that is not a forge job is its own only step."""
    if job.kind != "forge":
        return {job.kind: job}
    children = await session.scalars(select(Job).where(Job.parent_id == job.id))
    return {child.kind: child for child in children}


def _overall_progress(job: Job, steps: dict[str, Job]) -> float:
    """The progress of a forge job follows from that of its steps."""
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
