"""Gives a running platform a past: `python -m tests.bench.history FINISHED WAITING`.

Copies of a job that really ran, and of all its events, spread over the last twenty days; then as many queued jobs
that no machine can run, and as many that are to run tomorrow.
"""

import asyncio
import sys
from datetime import timedelta
from typing import Any

from sqlalchemy import insert, select

from cluster.db import get_database, now
from cluster.ownership import LOCAL
from jobs import queue
from jobs.queue import JobRequest
from jobs.registry import Resources
from jobs.tables import Job, JobEvent

DAYS = 20
PAGE = 2000
TIMES = ("run_after", "created_at", "started_at", "finished_at", "updated_at")


async def main(finished: int, waiting: int) -> None:
    job, events = await _finished_job()
    for first in range(0, finished, PAGE):
        await _copy(job, events, range(first, min(first + PAGE, finished)), timedelta(days=DAYS) / finished)
    impossible = JobRequest(kind="probe", spec={"steps": 0}, resources=Resources(cpus=1000))
    tomorrow = JobRequest(kind="probe", spec={"steps": 0}, run_after=now() + timedelta(days=1))
    for request in (impossible, tomorrow):
        for _ in range(0, waiting, PAGE):
            async with get_database().transaction() as session:
                await queue.enqueue_many(session, [request] * min(PAGE, waiting), LOCAL)
    await get_database().close()


async def _finished_job() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The columns of some job that succeeded, and those of its events."""
    async with get_database().read_transaction() as session:
        job = (await session.scalars(select(Job).where(Job.kind == "probe", Job.finished_at.is_not(None)))).first()
        assert job is not None, "run a probe first"
        events = (await session.scalars(select(JobEvent).where(JobEvent.job_id == job.id))).all()
        columns = {column.key: getattr(job, column.key) for column in Job.__table__.columns}
        return columns, [
            {column.key: getattr(event, column.key) for column in JobEvent.__table__.columns if column.key != "id"}
            for event in events
        ]


async def _copy(job: dict[str, Any], events: list[dict[str, Any]], numbers: range, apart: timedelta) -> None:
    jobs: list[dict[str, Any]] = []
    copies: list[dict[str, Any]] = []
    for number in numbers:
        back = apart * (number + 1)
        moment = job["created_at"] - back
        identity = f"job_{moment:%Y%m%d_%H%M%S}_{number}"
        jobs.append(job | {name: job[name] - back for name in TIMES} | {"id": identity})
        copies += [event | {"job_id": identity, "created_at": event["created_at"] - back} for event in events]
    async with get_database().transaction() as session:
        await session.execute(insert(Job), jobs)
        await session.execute(insert(JobEvent), copies)


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), int(sys.argv[2])))
