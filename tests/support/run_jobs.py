"""Run queued jobs in this process, and write their results to their rows."""

import asyncio
from typing import Any
from uuid import uuid4

import httpx
from sqlalchemy import select

from cluster.db import Database, now
from jobs.context import Context
from jobs.execution.report_writer import to_storable
from jobs.leases import Claim
from jobs.registry import find_kind, load_function
from jobs.states import State
from jobs.tables import Job
from tests.support.api_client import ApiClient
from tests.support.recording_link import RecordingLink


async def run_queued(database: Database, *kinds: str) -> list[RecordingLink]:
    """Run all queued jobs of these kinds, the oldest first."""
    async with database.read_transaction() as session:
        queued = select(Job).where(Job.state == State.QUEUED, Job.kind.in_(kinds)).order_by(Job.created_at, Job.id)
        jobs = list(await session.scalars(queued))
    return [await _run_job(database, job) for job in jobs]


async def request_and_run(
    api: ApiClient, path: str, body: dict[str, Any], *kinds: str, username: str = "admin"
) -> httpx.Response:
    """Call a route that waits for a job: once to queue it, and again with the same key when it has finished."""
    headers = {"Idempotency-Key": uuid4().hex}
    first = await api.request(username, "POST", f"{path}?wait=0", json=body, headers=headers)
    if first.status_code != 202:
        return first
    assert await run_queued(api.database, *kinds)
    return await api.request(username, "POST", f"{path}?wait=0", json=body, headers=headers)


async def _run_job(database: Database, job: Job) -> RecordingLink:
    link = RecordingLink()
    claim = Claim(
        job_id=job.id,
        token="token",
        kind=job.kind,
        spec=job.spec,
        checkpoint=None,
        attempt=1,
        max_attempts=1,
        time_limit=None,
        stall_limit=None,
        resources={},
        worker="",
        owner_id=job.owner_id,
    )
    kind = find_kind(job.kind)
    function = load_function(kind.entrypoint)
    result = await asyncio.to_thread(function, Context(claim, link), kind.spec.model_validate(job.spec))
    async with database.transaction() as session:
        row = await session.get_one(Job, job.id)
        row.state, row.result, row.finished_at = State.SUCCEEDED, to_storable(result), now()
    return link
