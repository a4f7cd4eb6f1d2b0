"""The dispatcher: the one process that gives jobs to workers. It is a named Ray actor, which Ray restarts.

It has no state that it cannot read again: the database knows which job runs where, Ray which workers are alive. Light
jobs go to a pool of warm workers with slots; a heavy job gets an actor of its own, with its CPUs, GPUs and memory. The
dispatcher sleeps until it is woken, a worker has a free slot, or something is due.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import time
from collections.abc import Coroutine
from typing import Any

import ray
import ray.exceptions

from cluster import logs
from cluster.db import get_database
from cluster.runtime.node_versions import NodeVersions
from cluster.settings import get_settings
from jobs import backup, leases, schedules
from jobs.dispatch import disabled_accounts, holder
from jobs.dispatch.capacity import HEAVY_PREFIX, POOL_PREFIX, ClusterCapacity, actor_options, placed_elsewhere
from jobs.execution.worker import Worker
from jobs.journal import JournalEntry
from jobs.leases import Claim, GuardedWrite, LeadershipLost, LeaseWatch
from jobs.mlflow_sync import MlflowSync
from jobs.registry import LIGHT, Resources
from jobs.retry_policy import Failure
from jobs.sweep import SWEEP_SCHEDULE
from jobs.tables import Job

log = logging.getLogger(__name__)

MAX_IDLE_SECONDS = 5.0
"""How long the dispatcher sleeps if it is not woken: the longest delay of a job whose wake-up was lost."""
MIN_ROUND_SECONDS = 0.01
"""Minimum time between two rounds."""
CLUSTER_VIEW_SECONDS = 1.0
"""Maximum age of the dispatcher's view of the cluster while a heavy job waits."""
ADOPT_TIMEOUT_SECONDS = 3.0
MAX_START_SECONDS = 600.0
"""How long the process of a heavy worker may take to start before its job is queued again."""


class Dispatcher:
    def __init__(self) -> None:
        logs.configure("dispatcher")
        self._settings = get_settings().jobs
        self._namespace = get_settings().ray_namespace
        self._database = get_database()
        self._holder, self._predecessor = holder.new_holder(), holder.find_predecessor()
        self._token = ""
        self._wake = asyncio.Event()
        self._capacity = ClusterCapacity(self._settings.slots)
        # All nodes of our own Ray are this machine.
        self._node_versions = NodeVersions() if get_settings().ray.address else None
        self._handles: dict[str, Any] = {}
        self._starting: dict[str, tuple[str, float]] = {}  # heavy workers without a process yet: token, time
        self._unstarted: set[str] = set()  # workers, warm or heavy, that have not answered yet
        self._tasks: set[asyncio.Task[None]] = set()
        self._start_task(self._lead_forever())

    async def wake(self) -> None:
        """Begin a round now, because there may be something to do."""
        self._wake.set()

    async def released(self, worker: str, job_ids: list[str]) -> None:
        """Called by a worker that has finished jobs and has free slots."""
        for job_id in job_ids:
            self._capacity.release(worker, job_id)
        self._dismiss_if_done(worker)
        self._wake.set()

    async def control(self, worker: str, job_id: str, control: str | None) -> None:
        """Pass a control request to the worker of a running job."""
        if worker in self._handles:
            self._handles[worker].control.remote(job_id, control)

    async def retire(self, worker: str) -> None:
        """Give no more jobs to a worker with a job that does not stop, and end it when its other jobs have finished."""
        log.warning("worker %s is retired: a job on it does not stop", worker)
        self._capacity.retire(worker)
        self._dismiss_if_done(worker)
        self._fill_pool()
        self._wake.set()

    async def _lead_forever(self) -> None:
        """Take the leadership and dispatch. After the loss of the leadership or of the database, start again."""
        while True:
            try:
                await self._take_leadership()
                await self._check_nodes()
                await self._adopt_workers()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._dispatch_forever())
                    tasks.create_task(self._maintain_forever())
                    tasks.create_task(MlflowSync(self._database).sync_forever())
            except* LeadershipLost:
                log.warning("another dispatcher has taken over")
            except* Exception:
                log.exception("dispatching was interrupted; starting again")
            self._token = ""
            await asyncio.sleep(1)

    async def _take_leadership(self) -> None:
        watch = LeaseWatch()
        while True:
            async with self._database.transaction() as session:
                token = await leases.take_leadership(session, self._holder, watch, self._predecessor)
            if token:
                self._token = token
                holder.remember(self._holder)
                log.info("leading")
                return
            await asyncio.sleep(self._settings.lease_seconds / 3)

    async def _dispatch_forever(self) -> None:
        last_round = last_view = -math.inf
        while True:
            # Wake-ups that arrive together are handled together: each round costs a transaction.
            await asyncio.sleep(last_round + MIN_ROUND_SECONDS - time.monotonic())
            last_round = time.monotonic()
            self._wake.clear()
            async with self._database.transaction() as session:
                claims = await leases.claim_jobs(session, self._token, self._capacity)
                wait_seconds, is_heavy_queued = await leases.next_wakeup(session)
            self._capacity.mark_view_used()
            for worker, batch in _group_by_worker(claims).items():
                await self._start(worker, batch)
            is_view_new = False
            if is_heavy_queued and time.monotonic() - last_view > CLUSTER_VIEW_SECONDS:
                self._capacity.update_cluster(*await asyncio.to_thread(_read_cluster))
                last_view, is_view_new = time.monotonic(), True
            if claims or is_view_new:
                continue
            # Not wait_for(), which may swallow a cancellation: dispatching would continue without the other tasks.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(
                    min(wait_seconds, CLUSTER_VIEW_SECONDS if is_heavy_queued else MAX_IDLE_SECONDS)
                ):
                    await self._wake.wait()

    async def _maintain_forever(self) -> None:
        """Renew the leadership, release the jobs of workers without a heartbeat, fire schedules, stop the work of
        disabled accounts."""
        async with self._database.transaction() as session:
            await schedules.ensure(session, SWEEP_SCHEDULE)
            await backup.follow_settings(session)
        watch = LeaseWatch()
        while True:
            async with self._database.transaction() as session:
                await leases.renew_leadership(session, self._token)
                lost = await leases.release_expired_jobs(session, watch)
                await schedules.fire_due(session)
                controls = await leases.renew(session, [token for token, _ in self._starting.values()])
                jobs_by_worker = await leases.running_jobs_by_worker(session)
            await disabled_accounts.stop_work(self._database)
            for job_id, worker in lost:
                log.warning("worker %s sends no heartbeat; %s goes to another one", worker, job_id)
                self._capacity.release(worker, job_id)
                if worker not in jobs_by_worker:
                    self._capacity.retire(worker)
                    self._dismiss(worker)
            for worker, (token, since) in list(self._starting.items()):
                if controls.get(token) or time.monotonic() - since > MAX_START_SECONDS:
                    self._dismiss(worker)
            self._capacity.reconcile(
                {name: [job.id for job in jobs] for name, jobs in jobs_by_worker.items()}, MAX_IDLE_SECONDS
            )
            for worker in self._capacity.workers():
                self._dismiss_if_done(worker)
            await self._check_nodes()
            self._fill_pool()
            async with self._database.read_transaction() as session:
                wait_seconds = await schedules.seconds_until_due(session)
            await asyncio.sleep(min(wait_seconds, self._settings.lease_seconds / 3))

    async def _check_nodes(self) -> None:
        """Find the nodes with another version of Forgearr, which may have joined meanwhile."""
        if self._node_versions is not None:
            self._capacity.avoided_nodes = await asyncio.to_thread(self._node_versions.refresh)

    async def _adopt_workers(self) -> None:
        """After a restart of this process, adopt the living workers, and release the jobs of the dead ones."""
        async with self._database.read_transaction() as session:
            jobs_by_worker = await leases.running_jobs_by_worker(session)
        actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
        alive = {actor["name"] for actor in actors if actor["namespace"] == self._namespace}
        workers = {name for name in alive if name.startswith((POOL_PREFIX, HEAVY_PREFIX))}
        for worker in sorted({*jobs_by_worker, *workers} - set(self._handles)):
            running = await self._adopt(worker, jobs_by_worker.get(worker, [])) if worker in alive else []
            # A job that the worker does not know was claimed just before this process died, and was never sent to it.
            async with self._database.transaction() as session:
                await leases.release_lost_jobs(session, worker, still_running=running, count_loss=False)
        self._fill_pool()

    async def _adopt(self, worker: str, jobs: list[Job]) -> list[str]:
        """Adopt a living worker, and return the ids of the jobs that run there."""
        try:
            handle = ray.get_actor(worker, namespace=self._namespace)
            running = await asyncio.wait_for(handle.jobs.remote(), ADOPT_TIMEOUT_SECONDS)
        except (ValueError, TimeoutError, ray.exceptions.RayError):
            log.warning("worker %s does not answer; its jobs go to others", worker)
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(worker, namespace=self._namespace))
            return []
        self._handles[worker] = handle
        resources = next((Resources.model_validate(job.resources) for job in jobs), LIGHT)
        self._capacity.add(worker, resources if worker.startswith(HEAVY_PREFIX) else None)
        for job_id in running:
            self._capacity.occupy(worker, job_id)
        log.info("adopted %s with %d jobs", worker, len(running))
        self._start_task(self._watch(worker, handle))
        return running

    def _fill_pool(self) -> None:
        while self._capacity.pool_size() < self._settings.workers:
            name = f"{POOL_PREFIX}{secrets.token_hex(4)}"
            self._create(name, slots=self._settings.slots, options={"num_cpus": 0})
            self._capacity.add(name, None)
            self._wake.set()

    async def _start(self, worker: str, claims: list[Claim]) -> None:
        if (resources := self._capacity.resources_of(worker)) and worker not in self._handles:
            try:
                self._create(worker, slots=1, options=actor_options(resources))
            except (TypeError, ValueError) as error:
                return await self._fail_unplaceable(claims[0], f"Ray refuses its resources: {error}")
            self._starting[worker] = (claims[0].token, time.monotonic())
        if worker in self._handles:
            self._handles[worker].run.remote(claims)
        else:  # the worker died after the claim
            async with self._database.transaction() as session:
                await leases.release_lost_jobs(session, worker, count_loss=False)

    async def _fail_unplaceable(self, claim: Claim, reason: str) -> None:
        """Fail a job for which no worker can be created, so that the other jobs are not affected."""
        self._capacity.remove(claim.worker)
        values = leases.failure_values(Failure("unplaceable", reason), attempt=1, max_attempts=1)
        failure = GuardedWrite(
            claim.job_id, claim.token, values, [JournalEntry(claim.job_id, "failed", {"error": values["error"]})]
        )
        async with self._database.transaction() as session:
            await leases.apply_writes(session, [failure])

    def _create(self, name: str, *, slots: int, options: dict[str, Any]) -> None:
        """Create a worker as a detached actor, so that it and its jobs outlive this process."""
        actor = ray.remote(Worker).options(
            name=name,
            namespace=self._namespace,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=1000,
            **placed_elsewhere(options, self._capacity.avoided_nodes),
        )
        handle: Any = actor.remote(name, slots)
        self._handles[name] = handle
        self._unstarted.add(name)
        self._start_task(self._await_start(name, handle.jobs.remote()))
        self._start_task(self._watch(name, handle))

    async def _await_start(self, worker: str, first_answer: Any) -> None:
        """Wait until a worker runs. If it needs GPUs or a new machine, that may take longer than a lease."""
        with contextlib.suppress(ray.exceptions.RayError):
            await first_answer
            self._unstarted.discard(worker)
            self._starting.pop(worker, None)

    async def _watch(self, worker: str, handle: Any) -> None:
        """Wait for the death of a worker, to release its jobs at once and not when their leases expire."""
        with contextlib.suppress(ray.exceptions.RayError):
            await handle.until_death.remote()
        ray.kill(handle)  # it may be alive, but unreachable
        self._handles.pop(worker, None)
        self._capacity.remove(worker)
        self._starting.pop(worker, None)
        has_started = worker not in self._unstarted
        self._unstarted.discard(worker)
        async with self._database.transaction() as session:
            for job_id, _ in await leases.release_lost_jobs(session, worker, count_loss=has_started):
                log.warning("worker %s died; %s goes to another one", worker, job_id)
        self._fill_pool()
        self._wake.set()

    def _dismiss_if_done(self, worker: str) -> None:
        if self._capacity.is_done(worker):
            self._dismiss(worker)

    def _dismiss(self, worker: str) -> None:
        """End a worker's process. A frozen one ends when it wakes up."""
        if handle := self._handles.get(worker):
            ray.kill(handle)
        else:
            self._capacity.remove(worker)

    def _start_task(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _read_cluster() -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Return the free resources of the cluster, and its living nodes."""
    available: dict[str, float] = {**ray.available_resources()}
    return available, [node for node in ray.nodes() if node["Alive"]]


def _group_by_worker(claims: list[Claim]) -> dict[str, list[Claim]]:
    groups: dict[str, list[Claim]] = {}
    for claim in claims:
        groups.setdefault(claim.worker, []).append(claim)
    return groups
