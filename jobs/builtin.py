"""The kinds of job that the queue itself brings: `probe`, to try it out, and `sweep`, to keep it tidy."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import and_, delete, false, select

from cluster.db import Database, apart, delete_rows, now
from cluster.errors import ForgearrError
from cluster.settings import get_settings
from jobs import file_uploads, files
from jobs.context import Context
from jobs.registry import job, kinds
from jobs.schedules import ScheduleRequest
from jobs.states import FINISHED
from jobs.tables import IdempotencyKey, Job, JobEvent, Leadership, ScheduleTick

SWEEP_PAGE = 5000
SWEEP_SCHEDULE = ScheduleRequest(name="sweep", kind="sweep", cron="17 * * * *")

Sweeper = Callable[[Database], Awaitable[int]]
_sweepers: dict[str, Sweeper] = {}


def sweeper(name: str) -> Callable[[Sweeper], Sweeper]:
    """Declare the function below, in a module that is named in `jobs.modules`, as a part of every sweep.

    It deletes what has had its time, and returns how much that was."""

    def declare(function: Sweeper) -> Sweeper:
        _sweepers[name] = function
        return function

    return declare


class ProbeSpec(BaseModel):
    """What a probe should do."""

    model_config = ConfigDict(extra="forbid")

    payload: Any = Field(default=None, description="Returned as it is.")
    seconds: float = Field(default=0, ge=0, le=86_400, description="How long all steps take together.")
    steps: int = Field(default=1, ge=0, le=1000, description="Each step is reported and checkpointed.")
    fail_times: int = Field(default=0, ge=0, le=100, description="How many attempts fail after their first step.")
    memory_mb: int = Field(default=0, ge=0, le=1_000_000, description="Memory to hold while it runs.")


class ProbeFailed(ForgearrError):
    """The probe failed, as it was asked to."""

    code = "PROBE_FAILED"
    retryable = True


def _takes_memory(spec: ProbeSpec) -> bool:
    """Which nobody has counted, so that others may lack it."""
    return spec.memory_mb > 0


@job("probe", spec=ProbeSpec, admin_only=_takes_memory)
def probe(context: Context, spec: ProbeSpec) -> dict[str, Any]:
    """Goes through steps, and returns its payload and the steps it really executed."""
    ballast = bytearray(spec.memory_mb * 1024 * 1024)
    ballast[::4096] = b"\1" * len(ballast[::4096])  # touched, so that it is really there
    executed: list[int] = list(context.checkpoint_state or [])
    for step in range(len(executed), spec.steps):
        context.sleep(spec.seconds / spec.steps)
        executed.append(step)
        context.report(progress=100 * (step + 1) / spec.steps, phase=f"step {step + 1} of {spec.steps}", step=step)
        context.checkpoint(executed)
        if context.attempt <= spec.fail_times:
            break
    if context.attempt <= spec.fail_times:
        raise ProbeFailed(f"Attempt {context.attempt} of {spec.fail_times} that were to fail.")
    return {"payload": spec.payload, "executed": executed}


class SweepSpec(BaseModel):
    """A sweep needs nothing."""

    model_config = ConfigDict(extra="forbid")


@job("sweep", spec=SweepSpec, admin_only=True, concurrency=1)
def sweep(context: Context, spec: SweepSpec) -> dict[str, int]:
    """Expires idempotency keys, old events, files, uploads, and what other modules keep for a time."""
    return asyncio.run(apart(lambda database: _sweep(context, database)))


async def _sweep(context: Context, database: Database) -> dict[str, int]:
    event_days = get_settings().jobs.event_days
    async with database.transaction() as session:
        keys = await delete_rows(session, delete(IdempotencyKey).where(IdempotencyKey.expires_at <= now()))
        old_ticks = now() - timedelta(days=event_days)
        await delete_rows(session, delete(ScheduleTick).where(ScheduleTick.fire_at < old_ticks))
    context.report(progress=50, phase="old events")
    events = 0
    while page := await _delete_old_events(database, event_days):
        events += page
        context.report(phase=f"{events} old events")
    expired = await files.remove_expired(database)
    uploads = await file_uploads.remove_expired(database)
    kinds()  # so that every module has declared its own
    others: dict[str, int] = {}
    for name, remove_old in _sweepers.items():
        context.report(phase=f"old {name}")
        others[name] = await remove_old(database)
    return {
        "idempotency_keys": keys,
        "events": events,
        "files": expired,
        "uploads": uploads,
        **others,
    }


async def _delete_old_events(database: Database, days: float) -> int:
    """A page of old events of finished jobs, but none that MLflow has still to be told."""
    async with database.transaction() as session:
        told = await session.scalar(select(Leadership.tracked_until)) or 0
        untold = and_(JobEvent.id > told, Job.tracked) if get_settings().mlflow_uri else false()
        old = (
            select(JobEvent.id)
            .join(Job, Job.id == JobEvent.job_id)
            .where(JobEvent.created_at < now() - timedelta(days=days), Job.state.in_(FINISHED))
            .where(~untold)
            .limit(SWEEP_PAGE)
        )
        return await delete_rows(session, delete(JobEvent).where(JobEvent.id.in_(old)))
