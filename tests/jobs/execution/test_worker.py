"""A worker that cannot renew its leases stops its jobs by itself. On both databases."""

import asyncio
import subprocess
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import pytest
from sqlalchemy import text

from cluster.db import Database
from cluster.ownership import LOCAL
from jobs import journal, leases, queue
from jobs.leases import OWN_WORKER, LeaseWatch
from jobs.queue import JobRequest
from jobs.states import State
from jobs.tables import Job
from tests.support.waiting import TIMEOUT, eventually_async

pytestmark = pytest.mark.both_databases


@pytest.fixture(autouse=True)
def _settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("FORGEARR_JOBS__LEASE_SECONDS", "3")
    monkeypatch.setenv("FORGEARR_JOBS__MODULES", "[jobs.probe, tests.support.job_kinds]")


async def test_a_worker_without_its_database_stops_before_its_jobs_go_to_others(
    database: Database, tmp_path: Path
) -> None:
    note = tmp_path / "note"
    async with database.transaction() as session:
        job = await queue.enqueue(session, JobRequest(kind="noted", spec={"file": str(note)}), LOCAL)
    with lone_worker():
        await eventually_async(lambda: note.exists() and note.read_text() == "running")
        async with database.transaction() as session:
            if not database.is_sqlite:
                await session.execute(text("LOCK TABLE jobs IN ACCESS EXCLUSIVE MODE"))
            # Nobody else reaches the jobs now: the worker as if it was cut off, the dispatcher in this transaction.
            watch = LeaseWatch()
            while note.read_text() == "running":
                assert await leases.release_expired_jobs(session, watch) == [], "another worker would have the job"
                await asyncio.sleep(0.02)
        assert note.read_text() == "lease_expired"
        row = await _wait_until_queued_again(database, job.id)
    assert (row.losses, row.attempt, row.worker, row.lease_token) == (0, 1, None, None)
    async with database.read_transaction() as session:
        assert [event.type for event in await journal.read(session, job.id)] == ["queued", "running", "queued"]


async def test_a_suspect_that_gets_further_goes_back_to_the_shared_workers_at_once(database: Database) -> None:
    """Else many innocent jobs would run one after the other, because few can be alone at a time."""
    async with database.transaction() as session:
        job = await queue.enqueue(session, JobRequest(kind="probe", spec={"steps": 3}), LOCAL)
        job.demand, job.losses = OWN_WORKER, 2
    with lone_worker():
        cleared = await _wait_until_queued_again(database, job.id)
    assert (cleared.checkpoint, cleared.demand, cleared.losses, cleared.attempt) == ([0], "", 0, 1)


@contextmanager
def lone_worker() -> Generator[None]:
    process = subprocess.Popen([sys.executable, "-m", "tests.jobs.execution.lone_worker"])
    try:
        yield
    finally:
        process.kill()
        process.wait(TIMEOUT)


async def _wait_until_queued_again(database: Database, job_id: str) -> Job:
    async def read() -> Job:
        async with database.read_transaction() as session:
            return await session.get_one(Job, job_id)

    def find_queued() -> Job | None:
        job = asyncio.run_coroutine_threadsafe(read(), loop).result()
        return job if job.state == State.QUEUED and job.attempt else None

    loop = asyncio.get_running_loop()
    return await eventually_async(find_queued)
