"""/v1/fine_tuning/jobs, as OpenAI has them: the forge's own jobs, told in other words."""

import math
import re
from datetime import datetime, timedelta
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request
from pydantic import Field
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import ColumnElement, Select, and_, exists, func, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database
from cluster.errors import InvalidRequest
from jobs import journal, queue
from jobs.queue import JobRequest, Owner
from jobs.states import State
from jobs.tables import Job
from pipelines.training import datasets, presets, tiny
from pipelines.training.forge import SHARES
from pipelines.training.registry import ModelNotFound
from pipelines.training.spec import Data, FineTuneSpec
from serve import fine_tuned, fine_tuning_events
from serve.answering import models_of
from serve.api.jobs import JobId, owner_of
from serve.auth import CurrentCaller
from serve.bodies.fine_tuning import (
    Checkpoint,
    CheckpointMetrics,
    DpoHyperparameters,
    FineTuningJob,
    JobCreation,
    JobError,
    JobEvent,
    Status,
    UsedDpo,
    UsedDpoHyperparameters,
    UsedHyperparameters,
    UsedMethod,
    UsedSupervised,
)
from serve.engines.protocol import Folder
from serve.envelope import OPENAI_ERROR_RESPONSES
from serve.pages import CursorPage, cursor_page

router = APIRouter(prefix="/v1/fine_tuning/jobs", tags=["Fine-tuning"], responses=OPENAI_ERROR_RESPONSES)

KEPT_EPOCHS = 3
"""OpenAI's."""
LEARNING_RATE: float = FineTuneSpec.model_fields["learning_rate"].default
METADATA = re.compile(r"metadata\[(.+)\]")
ABOUT_DATA = {
    "empty_data",
    "file_not_found",
    "invalid_sample",
    "invalid_training_file",
    "nothing_to_train",
    "sample_too_long",
    "wrong_kind_of_data",
}
"""Errors of a training that come from its file."""

Limit = Annotated[int, Query(ge=1, le=100)]
After = Annotated[Annotated[str, Field(max_length=100)] | SkipJsonSchema[None], Query()]


class MethodNotThere(InvalidRequest):
    """Models are fine-tuned by the methods supervised and dpo; reinforcement is not available."""

    code = "METHOD_NOT_AVAILABLE"


class NotABase(InvalidRequest):
    """No training can begin with this model."""

    code = "NOT_A_BASE_MODEL"


@router.post("")
async def create_fine_tuning_job(
    request: Request,
    wanted: JobCreation,
    caller: CurrentCaller,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=200)] = None,
) -> FineTuningJob:
    """Fine-tune a model on a file, export and validate it. Nobody but its owner knows it by its name."""
    if wanted.method and wanted.method.type == "reinforcement":
        raise MethodNotThere
    owner = owner_of(caller)
    spec = _spec(wanted, await _base_model(request, wanted.model, owner))
    async with get_database().transaction() as session:
        for file_id in (wanted.training_file, wanted.validation_file):
            if file_id is not None:
                await datasets.check(session, Data(file=file_id), owner, spec["method"])
        job = await queue.enqueue(session, JobRequest(kind="forge", spec=spec), owner, idempotency_key=idempotency_key)
        return await _view(session, job)


@router.get("")
async def list_fine_tuning_jobs(
    request: Request, caller: CurrentCaller, after: After = None, limit: Limit = 20
) -> CursorPage[FineTuningJob]:
    """Fine-tuning jobs, the newest first, whichever door they came through; also by `metadata[key]=value`."""
    owner = owner_of(caller)
    async with get_database().reading() as session:
        wanted = _with_metadata(session, fine_tuned.trainings(owner), request)
        if after is not None:
            last = await _find(session, after, owner)
            same_time = and_(Job.created_at == last.created_at, Job.id < last.id)
            wanted = wanted.where(or_(Job.created_at < last.created_at, same_time))
        newest_first = wanted.order_by(Job.created_at.desc(), Job.id.desc()).limit(limit + 1)
        jobs = list(await session.scalars(newest_first))
        shown = [await _view(session, job) for job in jobs]
    return cursor_page(shown, [job.id for job in jobs], limit)


@router.get("/{job_id}")
async def show_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """One of them."""
    async with get_database().reading() as session:
        return await _view(session, await _find(session, job_id, owner_of(caller)))


@router.post("/{job_id}/cancel")
async def cancel_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """Cancel it: at once when it waits, as soon as it listens when it runs."""
    async with get_database().transaction() as session:
        job = await _find(session, job_id, owner_of(caller), lock=True)
        await queue.cancel(session, job)
        await session.flush()
        return await _view(session, job)


@router.post("/{job_id}/pause")
async def pause_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """Hold it: at once when it waits, at its next checkpoint when it trains."""
    async with get_database().transaction() as session:
        job = await _find(session, job_id, owner_of(caller), lock=True)
        await queue.pause(session, job)
        await session.flush()
        return await _view(session, job)


@router.post("/{job_id}/resume")
async def resume_fine_tuning_job(job_id: JobId, caller: CurrentCaller) -> FineTuningJob:
    """Let it go on from its checkpoint."""
    async with get_database().transaction() as session:
        job = await _find(session, job_id, owner_of(caller), lock=True)
        await queue.resume(session, job)
        await session.flush()
        return await _view(session, job)


@router.get("/{job_id}/events")
async def list_fine_tuning_events(
    job_id: JobId, caller: CurrentCaller, after: After = None, limit: Limit = 20
) -> CursorPage[JobEvent]:
    """What happened to it, the newest first: messages, and the numbers of each step."""
    async with get_database().reading() as session:
        job = await _find(session, job_id, owner_of(caller))
        events = await fine_tuning_events.page(session, job, after, limit + 1)
    return cursor_page(events, [event.id for event in events], limit)


@router.get("/{job_id}/checkpoints")
async def list_checkpoints(
    job_id: JobId, caller: CurrentCaller, after: After = None, limit: Limit = 10
) -> CursorPage[Checkpoint]:
    """The models that it had at the ends of its last three epochs, the newest first. Each can be asked."""
    async with get_database().reading() as session:
        job = await _find(session, job_id, owner_of(caller))
        epochs = fine_tuned.epochs(await fine_tuned.training_of(session, job))
    found = [_checkpoint(job, epoch) for epoch in reversed(epochs)]
    if after is not None:
        ids = [checkpoint.id for checkpoint in found]
        if after not in ids:
            raise InvalidRequest(f"There is no checkpoint '{after}' of {job.id}.")
        found = found[ids.index(after) + 1 :]
    return cursor_page(found, [checkpoint.id for checkpoint in found], limit)


async def _base_model(request: Request, model: str, owner: Owner) -> str:
    """What the forge calls it; of what changes its meaning, such as NAME:latest, what it means now."""
    if model.removesuffix(":latest") == tiny.NAME:
        return tiny.NAME
    if model in presets.names() or datasets.is_path(model):
        return model
    is_tuned = model.startswith(fine_tuned.PREFIX)
    if "/" in model and not is_tuned:
        return model  # of the Hugging Face hub
    try:
        meant = await models_of(request).resolve(model, owner)
    except ModelNotFound:
        if ":" in model:
            raise
        return model  # of the hub too, where some have no owner
    if isinstance(meant.source, Folder):
        raise NotABase(
            f"'{model}' was never exported, so no training can begin with it: take the model of a whole job."
        )
    return meant.reference


def _spec(wanted: JobCreation, base_model: str) -> dict[str, Any]:
    method = wanted.method.type if wanted.method else "supervised"
    told = wanted.wanted_hyperparameters
    suffix = re.sub(r"[^a-z0-9_-]+", "-", wanted.suffix.lower()).strip("-") if wanted.suffix else ""
    spec: dict[str, Any] = {
        "name": _registered_name(base_model, suffix),
        "base_model": base_model,
        "data": {"file": wanted.training_file},
        "method": method,
        "deploy": False,
        "keep_epochs": KEPT_EPOCHS,
        "metadata": wanted.metadata,
    }
    if suffix:
        spec["suffix"] = suffix
    if wanted.validation_file:
        spec["validation"] = {"file": wanted.validation_file}
    if wanted.seed is not None:
        spec["seed"] = wanted.seed
    if told.n_epochs not in (None, "auto"):
        spec["epochs"] = told.n_epochs
    if isinstance(told.batch_size, int):
        spec |= {"batch_size": told.batch_size, "gradient_accumulation": 1}
    if isinstance(told.learning_rate_multiplier, float):
        spec["learning_rate"] = LEARNING_RATE * told.learning_rate_multiplier
    if isinstance(told, DpoHyperparameters) and isinstance(told.beta, float):
        spec["beta"] = told.beta
    return spec


def _registered_name(base_model: str, suffix: str) -> str:
    """Under which versions of it are registered: ft-llama-3.2-1b-instruct."""
    last = base_model.rstrip("/").rpartition("/")[2].partition(":")[0].lower().removeprefix("ft-")
    slug = re.sub(r"[^a-z0-9._-]+", "-", last)
    return f"ft-{slug}"[: 99 - len(suffix)].rstrip("-._")


def _with_metadata(session: AsyncSession, wanted: Select[Job], request: Request) -> Select[Job]:
    for name, value in request.query_params.multi_items():
        if told := METADATA.fullmatch(name):
            wanted = wanted.where(_says(session, told[1], value))
        elif name == "metadata" and value == "null":
            wanted = wanted.where(Job.spec["metadata"].as_string().is_(None))
    return wanted


def _says(session: AsyncSession, key: str, value: str) -> ColumnElement[bool]:
    if session.get_bind().dialect.name == "postgresql":
        return Job.spec["metadata"][key].as_string() == value
    # A path of SQLite's finds no key that has quotes, or anything beyond ASCII, in it.
    pairs = func.json_each(Job.spec, "$.metadata").table_valued("key", "value")
    return exists(select(pairs.c.key).where(pairs.c.key == key, pairs.c.value == value))


async def _find(session: AsyncSession, job_id: str, owner: Owner, *, lock: bool = False) -> Job:
    query = fine_tuned.trainings(owner).where(Job.id == job_id)
    job = await session.scalar(query.with_for_update(key_share=True) if lock else query)
    if job is None:
        raise queue.JobNotFound(f"There is no fine-tuning job '{job_id}'.")
    return job


async def _view(session: AsyncSession, job: Job) -> FineTuningJob:
    training = await fine_tuned.training_of(session, job)
    spec: dict[str, Any] = job.spec
    result: dict[str, Any] = (training.result if training else None) or {}
    used = _used(spec, training, result)
    status = _status(job, training)
    validation: dict[str, Any] | None = spec.get("validation")
    if spec["method"] == "dpo":
        parameters = UsedDpoHyperparameters(**used.model_dump(), beta=spec["beta"])
        method = UsedMethod(type="dpo", dpo=UsedDpo(hyperparameters=parameters))
    else:
        method = UsedMethod(type="supervised", supervised=UsedSupervised(hyperparameters=used))
    return FineTuningJob(
        id=job.id,
        created_at=int(job.created_at.timestamp()),
        finished_at=int(job.finished_at.timestamp()) if job.finished_at else None,
        estimated_finish=await _estimated_finish(session, training) if status == "running" else None,
        status=status,
        error=await _error(session, job),
        model=spec["base_model"],
        fine_tuned_model=fine_tuned.name(job) if job.state == State.SUCCEEDED else None,
        organization_id=f"org-{job.owner_id or fine_tuned.organization(job)}",
        training_file=_source(spec["data"]),
        validation_file=_source(validation) if validation else None,
        result_files=result.get("result_files", []),
        trained_tokens=result.get("trained_tokens"),
        hyperparameters=used,
        method=method,
        seed=spec["seed"],
        metadata=spec.get("metadata"),
        user_provided_suffix=spec.get("suffix"),
    )


def _used(spec: dict[str, Any], training: Job | None, result: dict[str, Any]) -> UsedHyperparameters:
    state: Any = training.checkpoint if training else None
    place: dict[str, Any] = state.get("place", {}) if isinstance(state, dict) else {}
    in_memory = result.get("batch_size") or place.get("batch_size") or spec["batch_size"]
    steps = place.get("gradient_accumulation") or spec["gradient_accumulation"]
    return UsedHyperparameters(
        batch_size=in_memory * steps * spec["workers"] if isinstance(in_memory, int) else "auto",
        learning_rate_multiplier=float(f"{spec['learning_rate'] / LEARNING_RATE:.6g}"),
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


async def _error(session: AsyncSession, job: Job) -> JobError | None:
    if job.state != State.FAILED or not job.error:
        return None
    told: dict[str, Any] = job.error
    if job.kind == "forge":
        failed = select(Job).where(Job.parent_id == job.id, Job.state == State.FAILED).order_by(Job.id)
        step = await session.scalar(failed.limit(1))
        told = (step.error if step else None) or told
    param = "training_file" if told["code"] in ABOUT_DATA else None
    return JobError(code=told["code"], message=told["message"], param=param)


async def _estimated_finish(session: AsyncSession, training: Job | None) -> int | None:
    """When the training will be done by what it said last; what comes after it takes far less."""
    if training is None or training.state != State.RUNNING:
        return None
    for event in await journal.newest(session, training.id, "progress", limit=5):
        eta = event.data.get("metrics", {}).get("eta_seconds")
        if eta is not None:
            _, share = SHARES["fine_tune"]
            left = timedelta(seconds=eta)
            begun = training.started_at or event.created_at
            rest = (event.created_at + left - begun) * (100 - share) / share if training.parent_id else timedelta()
            return int((event.created_at + left + rest).timestamp())
    return None


def _source(data: dict[str, Any]) -> str:
    """A file's id; or what else a job of another door learns from."""
    for name in ("file", "dataset", "folder"):
        if data.get(name):
            return data[name]
    return "prompts"


def _checkpoint(job: Job, epoch: dict[str, Any]) -> Checkpoint:
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
        id=f"ftckpt_{fine_tuned.short_id(job)}_{epoch['step']}",
        created_at=int(datetime.fromisoformat(epoch["created_at"]).timestamp()),
        fine_tuned_model_checkpoint=fine_tuned.checkpoint_name(job, epoch["step"]),
        fine_tuning_job_id=job.id,
        metrics=metrics,
        step_number=epoch["step"],
    )
