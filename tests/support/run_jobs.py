"""Jobs that a door has queued, done here: each function with its own spec, and its outcome on its row."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
from sqlalchemy import select

from cluster.db import Database, now
from jobs.context import Context
from jobs.execution.report_writer import to_storable
from jobs.leases import Claim
from jobs.registry import Resources, find_kind, load_function
from jobs.states import State
from jobs.tables import Job
from tests.support.api_client import House


class Notes:
    """What a job has said, kept nowhere else."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}

    def report(self, claim: Claim, values: Mapping[str, Any], event: tuple[str, dict[str, Any]]) -> None:
        self.metrics |= event[1].get("metrics", {})

    def checkpoint(self, claim: Claim, state: Any) -> None: ...
    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        raise AssertionError("these jobs keep no files")

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        raise AssertionError("these jobs have no children")


async def run(database: Database, *kinds: str) -> list[Notes]:
    """Do all queued jobs of these kinds, the oldest first."""
    async with database.read_transaction() as session:
        queued = select(Job).where(Job.state == State.QUEUED, Job.kind.in_(kinds)).order_by(Job.created_at, Job.id)
        jobs = list(await session.scalars(queued))
    return [await _do(database, job) for job in jobs]


async def ask(house: House, path: str, body: dict[str, Any], *kinds: str, who: str = "admin") -> httpx.Response:
    """Ask a door that waits for a job: once to have it queued, and again, under the same key, when it is done."""
    headers = {"Idempotency-Key": uuid4().hex}
    first = await house.ask(who, "POST", f"{path}?wait=0", json=body, headers=headers)
    if first.status_code != 202:
        return first
    assert await run(house.database, *kinds)
    return await house.ask(who, "POST", f"{path}?wait=0", json=body, headers=headers)


async def _do(database: Database, job: Job) -> Notes:
    notes = Notes()
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
    result = await asyncio.to_thread(function, Context(claim, notes), kind.spec.model_validate(job.spec))
    async with database.transaction() as session:
        row = await session.get_one(Job, job.id)
        row.state, row.result, row.finished_at = State.SUCCEEDED, to_storable(result), now()
    return notes
