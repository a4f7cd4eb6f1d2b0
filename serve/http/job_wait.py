"""Doors that wait for the outcome of a job, for as long as their callers will."""

import time
from typing import Annotated, Any

from fastapi import Query, Request

from cluster.db import get_database
from jobs import queue
from jobs.states import FINISHED
from jobs.tables import Job

LOOK_SECONDS = 5.0
"""How long a lost message may delay the news that a job has finished."""

Wait = Annotated[float, Query(ge=0, le=600, description="Seconds to wait for the outcome before answering without it.")]
UNFINISHED: dict[int | str, dict[str, Any]] = {202: {"description": "Not finished yet; ask again, or follow the job"}}


async def outcome_of(request: Request, job_id: str, seconds: float) -> Job:
    """The job when it has finished, or as it is when the time is up."""
    until = time.monotonic() + seconds
    async with request.app.state.hub.subscribe([f"job:{job_id}"]) as subscription:
        while True:
            async with get_database().reading() as session:
                job = await queue.get(session, job_id)
            left = until - time.monotonic()
            if job.state in FINISHED or left <= 0:
                return job
            await subscription.get(timeout=min(left, LOOK_SECONDS))
