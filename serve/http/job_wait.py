"""Doors that wait for the outcome of a job, for as long as their callers will."""

import time
from typing import Annotated, Any

from fastapi import Query, Request

from cluster.db import get_database
from cluster.ownership import LOCAL
from jobs import queue
from jobs.states import FINISHED
from jobs.tables import Job

POLL_SECONDS = 5.0
"""How long a lost message may delay the news that a job has finished."""

WaitSeconds = Annotated[
    float, Query(ge=0, le=600, description="Seconds to wait for the outcome before answering without it.")
]
UNFINISHED_RESPONSE: dict[int | str, dict[str, Any]] = {
    202: {"description": "Not finished yet; ask again, or follow the job"}
}


async def wait_for_job(request: Request, job_id: str, seconds: float) -> Job:
    """The job when it has finished, or as it is when the time is up."""
    deadline = time.monotonic() + seconds
    async with request.app.state.hub.subscribe([f"job:{job_id}"]) as subscription:
        while True:
            async with get_database().read_transaction() as session:
                job = await queue.get(session, job_id, LOCAL)
            left = deadline - time.monotonic()
            if job.state in FINISHED or left <= 0:
                return job
            await subscription.get(timeout=min(left, POLL_SECONDS))
