"""A queue without processes, for tests that act as the dispatcher and as the worker."""

from typing import Any

from cluster import ownership
from cluster.db import Database
from cluster.ownership import LOCAL, Principal
from jobs import leases, queue
from jobs.dispatch.capacity import ClusterCapacity
from jobs.journal import JournalEntry
from jobs.leases import Claim, GuardedWrite, LeaseWatch
from jobs.queue import JobRequest
from jobs.tables import Job

ONE_CPU: dict[str, Any] = {"NodeID": "node", "Resources": {"CPU": 1.0}, "Labels": {}}


class Clock:
    """A monotonic clock that goes on when the test says so."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class QueueHarness:
    """A queue with a leader and a pool of one worker."""

    def __init__(self, database: Database, slots: int = 8) -> None:
        self.database = database
        self.capacity = ClusterCapacity(slots)
        self.capacity.add("worker-1")
        self.token = ""
        self.clock = Clock()
        self.watch = LeaseWatch(self.clock)

    async def lead(self, holder: str = "here", watch: LeaseWatch | None = None) -> str | None:
        """Take the leadership, as a process of this name whose `watch` has seen the leader before."""
        async with self.database.transaction() as session:
            token = await leases.take_leadership(session, holder, watch or self.watch)
        self.token = token or self.token
        return token

    async def submit(self, principal: Principal = ownership.LOCAL, key: str | None = None, **request: Any) -> Job:
        job_request = JobRequest.model_validate({"kind": "probe", **request})
        async with self.database.transaction() as session:
            return await queue.enqueue(session, job_request, principal, idempotency_key=key)

    async def claim(self) -> list[Claim]:
        async with self.database.transaction() as session:
            return await leases.claim_jobs(session, self.token, self.capacity)

    async def write(self, claim: Claim, values: dict[str, Any], *entries: tuple[str, dict[str, Any]]) -> bool:
        """Return whether the write was accepted."""
        write = GuardedWrite(
            claim.job_id, claim.token, values, [JournalEntry(claim.job_id, *entry) for entry in entries]
        )
        async with self.database.transaction() as session:
            rejected = await leases.apply_writes(session, [write])
        if values.get("state"):
            self.capacity.release(claim.worker, claim.job_id)
        return not rejected

    async def job(self, job_id: str) -> Job:
        async with self.database.read_transaction() as session:
            return await session.get_one(Job, job_id)

    async def apply(self, action: Any, job_id: str) -> None:
        async with self.database.transaction() as session:
            await action(session, await queue.get(session, job_id, LOCAL, lock=True))

    async def release_expired(self) -> list[tuple[str, str]]:
        """Release the jobs with expired leases, as the housekeeping of the dispatcher does."""
        async with self.database.transaction() as session:
            released = await leases.release_expired_jobs(session, self.watch)
        for job_id, worker in released:
            self.capacity.release(worker, job_id)
        return released

    async def lose_worker(self, worker: str) -> None:
        """Let a worker die under its jobs."""
        async with self.database.transaction() as session:
            released = await leases.release_lost_jobs(session, worker)
        for job_id, _ in released:
            self.capacity.release(worker, job_id)
        if worker != "worker-1":
            self.capacity.remove(worker)
