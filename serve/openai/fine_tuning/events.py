"""Turns the journal of a training and its steps into the events of an OpenAI fine-tuning job."""

import re
from typing import Any, Literal

from sqlalchemy import ColumnElement, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.errors import InvalidRequest
from jobs.tables import Job, JobEvent
from serve.http.pagination import KeysetSlice, keyset_slice
from serve.openai.fine_tuning.schemas import FineTuningJobEvent as FineTuningEvent

PREFIX = "ftevent-"
IDENTIFIER = re.compile(PREFIX + r"(\d{1,18})")
STEPS = {
    "fine_tune": "Fine-tuning job started",
    "export": "Exporting the model",
    "validate": "Validating the model",
    "deploy": "Deploying the model",
}
LEVELS: dict[str, Literal["info", "warn", "error"]] = {"WARNING": "warn", "ERROR": "error"}
METRICS = {
    "loss": "train_loss",
    "token_accuracy": "train_mean_token_accuracy",
    "eval_loss": "valid_loss",
    "eval_token_accuracy": "valid_mean_token_accuracy",
    "reward_accuracy": "train_reward_accuracy",
    "eval_reward_accuracy": "valid_reward_accuracy",
    "learning_rate": "learning_rate",
}


async def read(session: AsyncSession, job: Job, after: str | None, limit: int) -> KeysetSlice[FineTuningEvent]:
    """The newest events, or the newest before the event `after`."""
    steps = {step.id: step.kind for step in await session.scalars(select(Job).where(Job.parent_id == job.id))}
    kinds = {**steps, job.id: job.kind}
    condition = or_(_job_events(job), and_(JobEvent.job_id.in_(steps), _step_events()))
    after_key = None if after is None else (_event_id(after),)
    events = await keyset_slice(session, select(JobEvent).where(condition), (JobEvent.id,), after_key, limit)
    return KeysetSlice([_to_openai(event, kinds[event.job_id], job) for event in events.items], events.has_more)


def _event_id(name: str) -> int:
    match = IDENTIFIER.fullmatch(name)
    if match is None:
        raise InvalidRequest(f"There is no event '{name}'.")
    return int(match[1])


def _job_events(job: Job) -> ColumnElement[bool]:
    """A forge job is parked while its steps run. Its return to the queue after that is no event for the client."""
    own = ["paused", "succeeded", "failed", "cancelled", "log"]
    queued = and_(JobEvent.type == "queued", JobEvent.data["parked"].as_string().is_(None))
    included = or_(JobEvent.type.in_(own), queued, *([_step_events()] if job.kind == "fine_tune" else []))
    return and_(JobEvent.job_id == job.id, included)


def _step_events() -> ColumnElement[bool]:
    has_loss = or_(*(JobEvent.data["metrics"][name].as_float().is_not(None) for name in ("loss", "eval_loss")))
    return or_(JobEvent.type.in_(["running", "log"]), and_(JobEvent.type == "progress", has_loss))


def _to_openai(event: JobEvent, kind: str, job: Job) -> FineTuningEvent:
    level: Literal["info", "warn", "error"] = "info"
    data: dict[str, Any] | None = None
    match event.type:
        case "progress":
            data = _openai_metrics(event.data["metrics"])
            message = _metrics_message(data)
        case "log":
            message, level = event.data["message"], LEVELS.get(event.data["level"], "info")
        case "running":
            message = STEPS.get(kind, f"The step {kind} has started")
        case "queued":
            message = _queued_message(event.data, job)
        case "paused":
            message = "Fine-tuning job paused"
        case "succeeded":
            message = "The job has successfully completed"
        case "failed":
            message, level = f"The job failed: {(event.data.get('error') or {}).get('message', '')}", "error"
        case _:
            message = "The job was cancelled"
    return FineTuningEvent(
        id=f"{PREFIX}{event.id}",
        created_at=int(event.created_at.timestamp()),
        level=level,
        message=message,
        type="metrics" if event.type == "progress" else "message",
        data=data,
    )


def _openai_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    values = {openai_name: metrics[name] for name, openai_name in METRICS.items() if name in metrics}
    return {"step": int(metrics["step"]), **values}


def _metrics_message(metrics: dict[str, Any]) -> str:
    losses_by_name = {"training loss": metrics.get("train_loss"), "validation loss": metrics.get("valid_loss")}
    losses = [f"{name}={value:.4f}" for name, value in losses_by_name.items() if value is not None]
    return f"Step {metrics['step']}: {', '.join(losses)}"


def _queued_message(data: dict[str, Any], job: Job) -> str:
    if "kind" in data:
        return f"Created fine-tuning job: {job.id}"
    if "resumed" in data:
        return "Fine-tuning job resumed"
    if "retried" in data:
        return "Fine-tuning job retried"
    return "Fine-tuning job queued again"
