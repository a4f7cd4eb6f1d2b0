"""Serializes a forge or fine_tune job as an OpenAI fine-tuning job."""

import math
import re
from datetime import datetime, timedelta
from typing import Any

from fastapi import Request
from sqlalchemy import ColumnElement, Select, exists, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from jobs import journal
from jobs.states import State
from jobs.tables import Job
from pipelines.training.forge import PROGRESS_RANGES
from serve.models import fine_tuned_names
from serve.openai.fine_tuning.creation import DATA_ERROR_CODES, DEFAULT_LEARNING_RATE
from serve.openai.fine_tuning.schemas import (
    Checkpoint,
    CheckpointMetrics,
    FineTuningJob,
    FineTuningJobError,
    Status,
    UsedDpo,
    UsedDpoHyperparameters,
    UsedHyperparameters,
    UsedMethod,
    UsedSupervised,
)

METADATA_PARAMETER = re.compile(r"metadata\[(.+)\]")


def with_metadata(session: AsyncSession, query: Select[Job], request: Request) -> Select[Job]:
    for name, value in request.query_params.multi_items():
        if matched := METADATA_PARAMETER.fullmatch(name):
            query = query.where(_metadata_equals(session, matched[1], value))
        elif name == "metadata" and value == "null":
            query = query.where(Job.spec["metadata"].as_string().is_(None))
    return query


def _metadata_equals(session: AsyncSession, key: str, value: str) -> ColumnElement[bool]:
    if session.get_bind().dialect.name == "postgresql":
        return Job.spec["metadata"][key].as_string() == value
    # JSON paths of SQLite find no keys with quotes or characters beyond ASCII.
    pairs = func.json_each(Job.spec, "$.metadata").table_valued("key", "value")
    return exists(select(pairs.c.key).where(pairs.c.key == key, pairs.c.value == value))


async def job_view(session: AsyncSession, job: Job) -> FineTuningJob:
    training = await fine_tuned_names.find_fine_tune_job(session, job)
    spec: dict[str, Any] = job.spec
    result: dict[str, Any] = (training.result if training else None) or {}
    hyperparameters = _used_hyperparameters(spec, training, result)
    status = _status(job, training)
    validation: dict[str, Any] | None = spec.get("validation")
    if spec["method"] == "dpo":
        parameters = UsedDpoHyperparameters(**hyperparameters.model_dump(), beta=spec["beta"])
        method = UsedMethod(type="dpo", dpo=UsedDpo(hyperparameters=parameters))
    else:
        method = UsedMethod(type="supervised", supervised=UsedSupervised(hyperparameters=hyperparameters))
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at.timestamp()),
        finished_at=int(job.finished_at.timestamp()) if job.finished_at else None,
        estimated_finish=await _estimated_finish(session, training) if status == "running" else None,
        status=status,
        error=await _error(session, job),
        model=spec["base_model"],
        fine_tuned_model=fine_tuned_names.model_name(job) if job.state == State.SUCCEEDED else None,
        organization_id=f"org-{job.owner_id or fine_tuned_names.organization(job)}",
        training_file=_source_id(spec["data"]),
        validation_file=_source_id(validation) if validation else None,
        result_files=result.get("result_files", []),
        trained_tokens=result.get("trained_tokens"),
        hyperparameters=hyperparameters,
        method=method,
        seed=spec["seed"],
        metadata=spec.get("metadata"),
        user_provided_suffix=spec.get("suffix"),
    )


def _used_hyperparameters(spec: dict[str, Any], training: Job | None, result: dict[str, Any]) -> UsedHyperparameters:
    state: Any = training.checkpoint if training else None
    trainer_state: dict[str, Any] = state.get("place", {}) if isinstance(state, dict) else {}
    per_device_batch = result.get("batch_size") or trainer_state.get("batch_size") or spec["batch_size"]
    accumulation_steps = trainer_state.get("gradient_accumulation") or spec["gradient_accumulation"]
    return UsedHyperparameters(
        batch_size=per_device_batch * accumulation_steps * spec["workers"]
        if isinstance(per_device_batch, int)
        else "auto",
        learning_rate_multiplier=float(f"{spec['learning_rate'] / DEFAULT_LEARNING_RATE:.6g}"),
        n_epochs=math.ceil(spec["epochs"]),
    )


def _status(job: Job, training: Job | None) -> Status:
    match job.state:
        case State.SUCCEEDED:
            return "succeeded"
        case State.FAILED:
            return "failed"
        case State.CANCELLED:
            return "cancelled"
        case State.PAUSED:
            return "paused"
        case _ if training is None or training.state == State.QUEUED:
            return "queued"
        case _ if training.state == State.PAUSED:
            return "paused"
        case _ if training.phase == "gathering the data":
            return "validating_files"
        case _:
            return "running"


async def _error(session: AsyncSession, job: Job) -> FineTuningJobError | None:
    if job.state != State.FAILED or not job.error:
        return None
    error_body: dict[str, Any] = job.error
    if job.kind == "forge":
        failed = select(Job).where(Job.parent_id == job.id, Job.state == State.FAILED).order_by(Job.id)
        step = await session.scalar(failed.limit(1))
        error_body = (step.error if step else None) or error_body
    param = "training_file" if error_body["code"] in DATA_ERROR_CODES else None
    return FineTuningJobError(code=error_body["code"], message=error_body["message"], param=param)


async def _estimated_finish(session: AsyncSession, training: Job | None) -> int | None:
    """The end that the training estimated last, and in proportion the time for the steps after the training."""
    if training is None or training.state != State.RUNNING:
        return None
    for event in await journal.newest(session, training.id, "progress", limit=5):
        eta = event.data.get("metrics", {}).get("eta_seconds")
        if eta is not None:
            _, share = PROGRESS_RANGES["fine_tune"]
            remaining = timedelta(seconds=eta)
            started_at = training.started_at or event.created_at
            later_steps = (
                (event.created_at + remaining - started_at) * (100 - share) / share
                if training.parent_id
                else timedelta()
            )
            return int((event.created_at + remaining + later_steps).timestamp())
    return None


def _source_id(data: dict[str, Any]) -> str:
    """The id of the file, or the data source of a job that another API created."""
    for name in ("file", "dataset", "folder"):
        if data.get(name):
            return data[name]
    return "prompts"


def checkpoint_view(job: Job, epoch: dict[str, Any]) -> Checkpoint:
    metrics = CheckpointMetrics(
        step=epoch["step"],
        train_loss=epoch.get("loss"),
        train_mean_token_accuracy=epoch.get("token_accuracy"),
        valid_loss=epoch.get("eval_loss"),
        valid_mean_token_accuracy=epoch.get("eval_token_accuracy"),
        full_valid_loss=epoch.get("eval_loss"),
        full_valid_mean_token_accuracy=epoch.get("eval_token_accuracy"),
    )
    return Checkpoint(
        id=f"ftckpt_{fine_tuned_names.short_id(job)}_{epoch['step']}",
        created_at=int(datetime.fromisoformat(epoch["created_at"]).timestamp()),
        fine_tuned_model_checkpoint=fine_tuned_names.checkpoint_name(job, epoch["step"]),
        fine_tuning_job_id=job.id,
        metrics=metrics,
        step_number=epoch["step"],
    )
