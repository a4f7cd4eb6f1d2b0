"""Retries, resources, storable values, the sweep, and guarded writes."""

import asyncio
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from cluster.db import Database, now
from cluster.errors import ForgearrError, InvalidRequest, Unavailable
from cluster.files.tables import File, Upload
from cluster.ownership import LOCAL
from jobs import leases, queue
from jobs.context import Context
from jobs.dispatch.capacity import actor_options
from jobs.execution.report_writer import to_storable
from jobs.leases import Claim
from jobs.queue import JobRequest
from jobs.registry import Resources
from jobs.retry_policy import backoff, classify_error
from jobs.states import State
from jobs.sweep import SweepSpec, sweep
from jobs.tables import IdempotencyKey, Job, JobEvent, Leadership
from tests.support.recording_link import RecordingLink

pytestmark = pytest.mark.both_databases


@pytest.mark.parametrize(
    ("error", "code", "is_retried"),
    [
        (Unavailable(), "service_unavailable", True),
        (InvalidRequest("No."), "invalid_request", False),
        (ForgearrError(), "internal_error", False),
        (ConnectionResetError("reset"), "job_error", True),
        (TimeoutError(), "job_error", True),
        (KeyError("x"), "job_error", False),
        (MemoryError(), "out_of_memory", True),
    ],
)
def test_the_type_of_an_error_decides_whether_it_is_retried(
    home: Path, error: Exception, code: str, is_retried: bool
) -> None:
    failure = classify_error(error, attempt=1)
    assert (failure.code, failure.retry_in is not None) == (code, is_retried)
    assert failure.message


def test_backoff_doubles_up_to_its_maximum(home: Path) -> None:
    delays = [backoff(attempt) for attempt in range(1, 20)]
    assert 1.5 <= delays[0] <= 2
    assert 3 <= delays[1] <= 4
    assert 225 <= delays[-1] <= 300


def test_resources_have_a_text_form() -> None:
    assert Resources().demand == ""
    resources = Resources(cpus=1.5, gpus=1, memory_mb=10, labels={"b": "2", "a": "1"})
    assert resources.demand == "1.5 CPU, 1 GPU, 10 MB memory, a=1, b=2"


def test_gpus_are_hidden_from_jobs_that_request_none() -> None:
    no_gpus = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    for resources in (Resources(cpus=1), Resources(cpus=1, workers=2)):
        assert actor_options(resources)["runtime_env"] == no_gpus
    for resources in (Resources(cpus=1, gpus=0.5), Resources(gpus=1, workers=2)):
        assert "runtime_env" not in actor_options(resources)


def test_only_json_is_storable() -> None:
    assert to_storable({"a": (1, math.nan, {"b\0": "\0\udc80"})}) == {"a": [1, None, {"b\ufffd": "\ufffd\ufffd"}]}
    with pytest.raises(ValueError, match="serialize"):
        to_storable(object())


async def test_a_sweep_deletes_only_what_has_expired(database: Database) -> None:
    long_ago = now() - timedelta(days=100)
    async with database.transaction() as session:
        old, fresh, tracked, untracked, dead = [
            await queue.enqueue(
                session, JobRequest(kind="probe", tracked=number in {2, 3}), LOCAL, idempotency_key=f"k{number}"
            )
            for number in range(5)
        ]
    async with database.transaction() as session:
        columns: dict[str, Any] = {"purpose": "batch", "filename": "a", "bytes": 1, "created_by": "local"}
        session.add_all([File(id="file-old", **columns, expires_at=long_ago), File(id="file-fresh", **columns)])
        session.add(Upload(id="upload_old", **columns, expires_at=long_ago))
        session.add(Leadership(id=1, holder="here", token="t", waiting={}))
        finished = [old.id, tracked.id, untracked.id]
        await session.execute(update(Job).where(Job.id.in_(finished)).values(state=State.SUCCEEDED))
        await session.execute(
            update(JobEvent).where(JobEvent.job_id.in_([*finished, dead.id])).values(created_at=long_ago)
        )
        await session.execute(update(IdempotencyKey).where(IdempotencyKey.job_id == old.id).values(expires_at=long_ago))
        last_tracked = select(func.max(JobEvent.id)).where(JobEvent.job_id == tracked.id).scalar_subquery()
        await session.execute(update(Leadership).values(tracked_until=last_tracked))
        lease = {"state": State.RUNNING, "worker": "gone", "lease_token": "t"}
        await session.execute(update(Job).where(Job.id == dead.id).values(**lease))
    claim = Claim("job_x", "t", "sweep", {}, None, 1, 3, None, None, {}, "worker-1", None)
    # A worker also runs it in a thread, because it has an event loop of its own.
    counts = await asyncio.to_thread(sweep, Context(claim, RecordingLink()), SweepSpec())
    assert counts == {
        "idempotency_keys": 1,
        "logins": 0,
        "jobs": 0,
        "events": 2,
        "files": 1,
        "uploads": 1,
        "audit_log": 0,
        "responses": 0,
        "blobs": 0,
        "batches": 0,
        "batch_parts": 0,
        "training_sessions": 0,
        "service_checks": 0,
        "tool_calls": 0,
        "downloads": 0,
        "recoveries": 0,
        "recommendations": 0,
    }
    async with database.read_transaction() as session:
        remaining = set(await session.scalars(select(JobEvent.job_id)))
        # Only the dispatcher can tell a lost worker from a pause of the whole platform.
        assert (await session.get_one(Job, dead.id)).state == State.RUNNING
    assert remaining == {fresh.id, untracked.id, dead.id}


async def test_a_batch_of_writes_rejects_only_those_with_a_stale_token(database: Database) -> None:
    async with database.transaction() as session:
        jobs = await queue.enqueue_many(session, [JobRequest(kind="probe") for _ in range(3)], LOCAL)
    async with database.transaction() as session:
        await session.execute(update(Job).values(state=State.RUNNING, worker="w", lease_token="good"))
    writes = [
        leases.GuardedWrite(job.id, "bad" if index == 1 else "good", {"progress": 50.0})
        for index, job in enumerate(jobs)
    ]
    async with database.transaction() as session:
        assert await leases.apply_writes(session, writes) == {"bad"}
    async with database.read_transaction() as session:
        assert [await session.scalar(select(Job.progress).where(Job.id == job.id)) for job in jobs] == [50, 0, 50]
