"""Retries, the registry, what can be stored, and the sweep."""

import asyncio
import math
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select, update

from cluster.db import Database, now
from cluster.errors import ForgearrError, InvalidRequest, Unavailable
from cluster.files.store import File
from cluster.files.uploads import Upload
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
    ("error", "code", "again"),
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
def test_an_error_decides_whether_there_is_another_attempt(
    home: Path, error: Exception, code: str, again: bool
) -> None:
    failure = classify_error(error, attempt=1)
    assert (failure.code, failure.retry_in is not None) == (code, again)
    assert failure.message


def test_waits_double_up_to_their_cap(home: Path) -> None:
    waits = [backoff(attempt) for attempt in range(1, 20)]
    assert 1.5 <= waits[0] <= 2
    assert 3 <= waits[1] <= 4
    assert 225 <= waits[-1] <= 300


def test_resources_have_one_word() -> None:
    assert Resources().demand == ""
    labels = Resources(cpus=1.5, gpus=1, memory_mb=10, labels={"b": "2", "a": "1"})
    assert labels.demand == "1.5 CPU, 1 GPU, 10 MB memory, a=1, b=2"


def test_only_jobs_that_asked_for_gpus_see_them() -> None:
    hidden = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
    for resources in (Resources(cpus=1), Resources(cpus=1, workers=2)):
        assert actor_options(resources)["runtime_env"] == hidden
    for resources in (Resources(cpus=1, gpus=0.5), Resources(gpus=1, workers=2)):
        assert "runtime_env" not in actor_options(resources)


def test_only_json_is_storable() -> None:
    assert to_storable({"a": (1, math.nan, {"b\0": "\0\udc80"})}) == {"a": [1, None, {"b\ufffd": "\ufffd\ufffd"}]}
    with pytest.raises(ValueError, match="serialize"):
        to_storable(object())


async def test_a_sweep_expires_what_is_old_and_nothing_else(database: Database) -> None:
    long_ago = now() - timedelta(days=100)
    async with database.transaction() as session:
        old, fresh, told, untold, dead = [
            await queue.enqueue(
                session, JobRequest(kind="probe", tracked=number in {2, 3}), LOCAL, idempotency_key=f"k{number}"
            )
            for number in range(5)
        ]
    async with database.transaction() as session:
        said: dict[str, Any] = {"purpose": "batch", "filename": "a", "bytes": 1, "created_by": "local"}
        session.add_all([File(id="file-old", **said, expires_at=long_ago), File(id="file-fresh", **said)])
        session.add(Upload(id="upload_old", **said, expires_at=long_ago))
        session.add(Leadership(id=1, holder="here", token="t", expires_at=now(), waiting={}))
        done = [old.id, told.id, untold.id]
        await session.execute(update(Job).where(Job.id.in_(done)).values(state=State.SUCCEEDED))
        await session.execute(update(JobEvent).where(JobEvent.job_id.in_([*done, dead.id])).values(created_at=long_ago))
        await session.execute(update(IdempotencyKey).where(IdempotencyKey.job_id == old.id).values(expires_at=long_ago))
        last_told = select(func.max(JobEvent.id)).where(JobEvent.job_id == told.id).scalar_subquery()
        await session.execute(update(Leadership).values(tracked_until=last_told))
        held = {"state": State.RUNNING, "worker": "gone", "lease_token": "t", "lease_expires_at": long_ago}
        await session.execute(update(Job).where(Job.id == dead.id).values(**held))
    claim = Claim("job_x", "t", "sweep", {}, None, 1, 3, None, None, {}, "worker-1", None)
    # In a thread, as a worker runs it: it has an event loop of its own.
    swept = await asyncio.to_thread(sweep, Context(claim, RecordingLink()), SweepSpec())
    assert swept == {
        "idempotency_keys": 1,
        "events": 2,
        "files": 1,
        "uploads": 1,
        "responses": 0,
        "blobs": 0,
        "batches": 0,
        "service_checks": 0,
        "tool_calls": 0,
        "downloads": 0,
        "recoveries": 0,
        "recommendations": 0,
    }
    async with database.read_transaction() as session:
        left = set(await session.scalars(select(JobEvent.job_id)))
        # Whether its worker is gone, or all of us were away for a while, is for the dispatcher to say.
        assert (await session.get_one(Job, dead.id)).state == State.RUNNING
    assert left == {fresh.id, untold.id, dead.id}


async def test_a_page_of_writes_refuses_only_the_stale_ones(database: Database) -> None:
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
