"""Waits for the end of a job, for routes that return its result."""

import time
from typing import Annotated, Any

from fastapi import Query, Request

from cluster.db import get_database
from cluster.ownership import LOCAL
from jobs import queue
from jobs.states import FINISHED
from jobs.tables import Job

POLL_SECONDS = 5.0
"""The longest delay of a response after a lost live message."""

WaitSeconds = Annotated[
    float, Query(ge=0, le=600, description="Seconds to wait for the result before a response without it.")
]
UNFINISHED_RESPONSE: dict[int | str, dict[str, Any]] = {
    202: {"description": "Not finished yet: repeat the request, or follow the job"}
}


async def wait_for_job(request: Request, job_id: str, seconds: float) -> Job:
    """The finished job, or the unfinished one after `seconds`."""
    deadline = time.monotonic() + seconds
    async with request.app.state.hub.subscribe([f"job:{job_id}"]) as subscription:
        while True:
            async with get_database().read_transaction() as session:
                job = await queue.get(session, job_id, LOCAL)
            remaining = deadline - time.monotonic()
            if job.state in FINISHED or remaining <= 0:
                return job
            await subscription.get(timeout=min(remaining, POLL_SECONDS))
