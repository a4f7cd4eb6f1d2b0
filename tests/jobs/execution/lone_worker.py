"""A worker without Ray, which claims what is queued: `python -m tests.jobs.execution.lone_worker`."""

import asyncio

from cluster.db import get_database
from jobs import leases
from jobs.dispatch.capacity import ClusterCapacity
from jobs.execution.worker import Worker
from tests.jobs.queue_harness import ONE_CPU


async def main() -> None:
    capacity = ClusterCapacity(8)
    capacity.add("worker-1")
    capacity.update_cluster({"CPU": 1.0}, [ONE_CPU])
    async with get_database().transaction() as session:
        token = await leases.take_leadership(session, "here", leases.LeaseWatch())
        claims = await leases.claim_jobs(session, token or "", capacity)
    await Worker("worker-1", 8).run(claims)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
