"""Our queue under load, from a process that has joined the platform's Ray.

`python -m tests.bench.our_queue throughput COUNT [BEHIND]`, `… latency COUNT`, `… calls COUNT`: prints JSON.
"""

import asyncio
import json
import logging
import sys
import time
from typing import Any
from uuid import uuid4

import ray
from sqlalchemy import select

from cluster.db import get_database
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs import queue
from jobs.queue import JobRequest
from jobs.states import FINISHED, State
from jobs.tables import Job

CHUNK = 1000
NOTHING = JobRequest(kind="probe", spec={"steps": 0})
STAMP = JobRequest(kind="stamp")


async def throughput(count: int, behind: int = 0) -> dict[str, Any]:
    """No-op jobs, from before the first is enqueued until the last has succeeded in the database.

    With `behind`, that many more of a lower priority lie behind them in the queue.
    """
    await _run_one(NOTHING)
    low = [NOTHING.model_copy(update={"priority": -1})] * behind
    # One transaction, so that none of those behind can start while nobody is before them.
    chunks = [[NOTHING] * min(CHUNK, count - first) for first in range(0, count, CHUNK)]
    principal = Principal(id=str(uuid4()), name="bench", is_admin=True)
    started = time.perf_counter()
    if behind:
        async with get_database().transaction() as session:
            await queue.enqueue_many(session, low, Principal(id=str(uuid4()), name="bench", is_admin=True))
            started = time.perf_counter()
            await queue.enqueue_many(session, [NOTHING] * count, principal)
    else:
        for chunk in chunks:
            async with get_database().transaction() as session:
                await queue.enqueue_many(session, chunk, principal)
    enqueued = time.perf_counter() - started
    await _wait_until_succeeded(principal, pause=0.02)
    seconds = time.perf_counter() - started
    if behind:
        await _wait_until_idle()
    return {"jobs_per_second": count / seconds, "enqueue_seconds": enqueued}


async def latency(count: int) -> dict[str, Any]:
    """From before the transaction that enqueues a job until its first line runs, one job at a time."""
    await _run_one(STAMP)
    return {"milliseconds": [await _run_one(STAMP) for _ in range(count)]}


async def calls(count: int) -> dict[str, Any]:
    """The floor under that latency: one call of a warm Ray actor, from before it until its first line runs."""

    class Stamp:
        async def now(self) -> float:
            return time.time()

    make: Any = ray.remote(Stamp)
    actor = make.options(num_cpus=0).remote()
    await actor.now.remote()
    milliseconds: list[float] = []
    for _ in range(count):
        started = time.time()
        milliseconds.append((await actor.now.remote() - started) * 1000)
    return {"milliseconds": milliseconds}


async def _run_one(request: JobRequest) -> float:
    principal = Principal(id=str(uuid4()), name="bench", is_admin=True)
    started = time.time()
    async with get_database().transaction() as session:
        job = await queue.enqueue(session, request, principal)
    await _wait_until_succeeded(principal, pause=0.005)
    async with get_database().read_transaction() as session:
        began = (await session.get_one(Job, job.id)).result
    return (began - started) * 1000 if isinstance(began, float) else 0.0


async def _wait_until_succeeded(principal: Principal, pause: float) -> None:
    unfinished = select(Job.state).where(Job.owner_id == principal.id, Job.state != State.SUCCEEDED).limit(1)
    while True:
        async with get_database().read_transaction() as session:
            state = await session.scalar(unfinished)
        if state is None:
            return
        assert state not in FINISHED, f"a job {state}"
        await asyncio.sleep(pause)


async def _wait_until_idle() -> None:
    runnable = select(Job.id).where(Job.state.in_([State.QUEUED, State.RUNNING]), Job.priority == -1).limit(1)
    while True:
        async with get_database().read_transaction() as session:
            if await session.scalar(runnable) is None:
                return
        await asyncio.sleep(0.1)


async def main(figure: str, *numbers: int) -> dict[str, Any]:
    ray.init(
        address=f"127.0.0.1:{get_settings().ray.port}",
        namespace=get_settings().ray_namespace,
        log_to_driver=False,
        logging_level=logging.WARNING,
    )
    measured = await {"throughput": throughput, "latency": latency, "calls": calls}[figure](*numbers)
    await get_database().close()
    return measured


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main(sys.argv[1], *map(int, sys.argv[2:])))))
