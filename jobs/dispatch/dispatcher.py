"""The dispatcher: the one process that gives jobs to workers. A named Ray actor, restarted by Ray when it dies.

It keeps nothing that it could not read again: what runs where is in the database, which workers live is in Ray. Light
jobs go to a pool of warm workers, each with some slots; a heavy one gets an actor of its own with its CPUs, GPUs and
memory. It sleeps until somebody wakes it, a worker has room again, or something falls due.
"""

import asyncio
import contextlib
import logging
import math
import secrets
import socket
import time
from collections.abc import Coroutine
from typing import Any

import ray
import ray.exceptions

from cluster import logs
from cluster.actors import NAMESPACE
from cluster.db import get_database
from cluster.settings import get_settings, home
from jobs import leases, schedules
from jobs.dispatch.capacity import HEAVY, POOLED, Room, actor_options
from jobs.execution.worker import Worker
from jobs.journal import Entry
from jobs.leases import Claim, LeadershipLost, Write
from jobs.mlflow_sync import Tracker
from jobs.registry import LIGHT, Resources
from jobs.retry_policy import Failure
from jobs.sweep import SWEEP_SCHEDULE
from jobs.tables import Job

log = logging.getLogger(__name__)

IDLE_SECONDS = 5.0
"""How long the dispatcher sleeps when nobody wakes it: the longest that a lost wake-up can delay a job."""
GATHER_SECONDS = 0.01
"""How far apart two looks at the queue are at least."""
LOOK_SECONDS = 1.0
"""How old the dispatcher's view of the cluster may be while a heavy job waits."""
ADOPT_SECONDS = 3.0
START_SECONDS = 600.0
"""How long the process of a heavy job may take to start before its job goes back into the queue."""


class Dispatcher:
    def __init__(self) -> None:
        logs.configure("dispatcher")
        self._settings = get_settings().jobs
        self._database = get_database()
        self._holder = f"{socket.gethostname()}:{home()}"
        self._token = ""
        self._wake = asyncio.Event()
        self._room = Room(self._settings.slots)
        self._handles: dict[str, Any] = {}
        self._starting: dict[str, tuple[str, float]] = {}  # heavy workers without a process yet: its job's lease, since
        self._tasks: set[asyncio.Task[None]] = set()
        self._keep(self._lead())

    async def wake(self) -> None:
        """There may be something to do."""
        self._wake.set()

    async def released(self, worker: str, job_ids: list[str]) -> None:
        """A worker has finished jobs, and has room again."""
        for job_id in job_ids:
            self._room.release(worker, job_id)
        self._dismiss_if_done(worker)
        self._wake.set()

    async def control(self, worker: str, job_id: str, control: str | None) -> None:
        """Pass on what somebody has asked of a running job."""
        if worker in self._handles:
            self._handles[worker].control.remote(job_id, control)

    async def retire(self, worker: str) -> None:
        """A worker holds a job that does not obey: give it no more, and end it when its other jobs have finished."""
        log.warning("worker %s is retired: a job on it does not stop", worker)
        self._room.retire(worker)
        self._dismiss_if_done(worker)
        self._fill_pool()
        self._wake.set()

    async def _lead(self) -> None:
        """Lead whenever that is possible. Losing the leadership, or the database, is a reason to begin again."""
        while True:
            try:
                await self._take_leadership()
                await self._adopt_workers()
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._dispatch_forever())
                    tasks.create_task(self._keep_house_forever())
                    tasks.create_task(Tracker(self._database).follow_forever())
            except* LeadershipLost:
                log.warning("another dispatcher has taken over")
            except* Exception:
                log.exception("dispatching was interrupted; beginning again")
            self._token = ""
            await asyncio.sleep(1)

    async def _take_leadership(self) -> None:
        while True:
            async with self._database.transaction() as session:
                token = await leases.take_leadership(session, self._holder)
            if token:
                self._token = token
                log.info("leading")
                return
            await asyncio.sleep(self._settings.lease_seconds / 3)

    async def _dispatch_forever(self) -> None:
        looked = seen = -math.inf
        while True:
            # Wishes that come together are met together: a look costs a transaction, however little it finds.
            await asyncio.sleep(looked + GATHER_SECONDS - time.monotonic())
            looked = time.monotonic()
            self._wake.clear()
            async with self._database.transaction() as session:
                claims = await leases.claim(session, self._token, self._room)
                due, heavy = await leases.outlook(session)
            self._room.looked()
            for worker, batch in _by_worker(claims).items():
                await self._start(worker, batch)
            is_new = False
            if heavy and time.monotonic() - seen > LOOK_SECONDS:
                self._room.see_cluster(*await asyncio.to_thread(_cluster))
                seen, is_new = time.monotonic(), True
            if claims or is_new:
                continue
            # Not wait_for(), which may miss that the task is cancelled: then dispatching would go on without the rest.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(due, LOOK_SECONDS if heavy else IDLE_SECONDS)):
                    await self._wake.wait()

    async def _keep_house_forever(self) -> None:
        """Renew the leadership, take jobs from workers that fell silent, and fire schedules."""
        async with self._database.transaction() as session:
            await schedules.ensure(session, SWEEP_SCHEDULE)
        lease = self._settings.lease_seconds
        looked = calm_since = time.time()
        while True:
            # When nobody could renew for a while, because the database was away, this process was, or the whole
            # machine slept, leases have run out that nobody let go of: give the workers time to renew them.
            calm_since = time.time() if time.time() - looked > lease else calm_since
            looked = time.time()
            async with self._database.transaction() as session:
                await leases.keep_leadership(session, self._token)
                lost = await leases.release_lost(session) if looked - calm_since > lease else []
                await schedules.fire_due(session)
                asked = await leases.renew(session, [token for token, _ in self._starting.values()])
                held = await leases.held_by_workers(session)
            for job_id, worker in lost:
                log.warning("worker %s fell silent; %s goes to another one", worker, job_id)
                self._room.release(worker, job_id)
                if worker not in held:
                    self._room.retire(worker)
                    self._dismiss(worker)
            for worker, (token, since) in list(self._starting.items()):
                if asked.get(token) or looked - since > START_SECONDS:
                    self._dismiss(worker)
            self._room.reconcile({name: [job.id for job in jobs] for name, jobs in held.items()}, IDLE_SECONDS)
            for worker in self._room.workers():
                self._dismiss_if_done(worker)
            self._fill_pool()
            async with self._database.reading() as session:
                due = await schedules.next_due(session)
            await asyncio.sleep(min(due, self._settings.lease_seconds / 3))

    async def _adopt_workers(self) -> None:
        """After a restart of this process: take up the workers that live on, and the jobs of those that do not."""
        async with self._database.reading() as session:
            held = await leases.held_by_workers(session)
        actors: list[Any] = ray.util.list_named_actors(all_namespaces=True)
        alive = {actor["name"] for actor in actors if actor["namespace"] == NAMESPACE}
        workers = {name for name in alive if name.startswith((POOLED, HEAVY))}
        for worker in sorted({*held, *workers} - set(self._handles)):
            running = await self._adopt(worker, held.get(worker, [])) if worker in alive else []
            # What it does not know of was claimed just before this process died, and never reached it.
            async with self._database.transaction() as session:
                await leases.release_lost(session, worker=worker, but=running, suspect=False)
        self._fill_pool()

    async def _adopt(self, worker: str, held: list[Job]) -> list[str]:
        """Take a living worker up; returns the jobs that run there."""
        try:
            handle = ray.get_actor(worker, namespace=NAMESPACE)
            running = await asyncio.wait_for(handle.jobs.remote(), ADOPT_SECONDS)
        except (ValueError, TimeoutError, ray.exceptions.RayError):
            log.warning("worker %s does not answer; its jobs go to others", worker)
            with contextlib.suppress(ValueError):
                ray.kill(ray.get_actor(worker, namespace=NAMESPACE))
            return []
        self._handles[worker] = handle
        heavy = next((Resources.model_validate(job.resources) for job in held), LIGHT)
        self._room.add(worker, heavy if worker.startswith(HEAVY) else None)
        for job_id in running:
            self._room.occupy(worker, job_id)
        log.info("adopted %s with %d jobs", worker, len(running))
        self._keep(self._watch(worker, handle))
        return running

    def _fill_pool(self) -> None:
        while self._room.pool_size() < self._settings.workers:
            name = f"{POOLED}{secrets.token_hex(4)}"
            self._create(name, slots=self._settings.slots, options={"num_cpus": 0})
            self._room.add(name, None)
            self._wake.set()

    async def _start(self, worker: str, claims: list[Claim]) -> None:
        if (resources := self._room.resources_of(worker)) and worker not in self._handles:
            try:
                self._create(worker, slots=1, options=actor_options(resources))
            except (TypeError, ValueError) as error:
                return await self._refuse(claims[0], f"Ray refuses what it asks for: {error}")
            self._starting[worker] = (claims[0].token, time.time())
            self._keep(self._await_start(worker))
        if worker in self._handles:
            self._handles[worker].run.remote(claims)
        else:  # it died after it had been chosen
            async with self._database.transaction() as session:
                await leases.release_lost(session, worker=worker, suspect=False)

    async def _refuse(self, claim: Claim, reason: str) -> None:
        """End a job that no worker can be made for, instead of everybody else's."""
        self._room.remove(claim.worker)
        values = leases.failed(Failure("unplaceable", reason), attempt=1, max_attempts=1)
        ending = Write(claim.job_id, claim.token, values, [Entry(claim.job_id, "failed", {"error": values["error"]})])
        async with self._database.transaction() as session:
            await leases.write(session, [ending])

    def _create(self, name: str, *, slots: int, options: dict[str, Any]) -> None:
        """Detached, so that the workers and their jobs outlive this process."""
        actor = ray.remote(Worker).options(
            name=name,
            namespace=NAMESPACE,
            lifetime="detached",
            max_restarts=0,
            max_concurrency=1000,
            **options,
        )
        self._handles[name] = actor.remote(name, slots)
        self._keep(self._watch(name, self._handles[name]))

    async def _await_start(self, worker: str) -> None:
        """A process that needs GPUs or a new machine may take longer to start than a lease lasts."""
        with contextlib.suppress(ray.exceptions.RayError):
            await self._handles[worker].jobs.remote()
            self._starting.pop(worker, None)

    async def _watch(self, worker: str, handle: Any) -> None:
        """Learn at once of a worker's death, instead of waiting for its leases to run out."""
        with contextlib.suppress(ray.exceptions.RayError):
            await handle.until_death.remote()
        ray.kill(handle)  # it may be out of reach only
        self._handles.pop(worker, None)
        self._room.remove(worker)
        never_started = self._starting.pop(worker, None) is not None
        async with self._database.transaction() as session:
            for job_id, _ in await leases.release_lost(session, worker=worker, suspect=not never_started):
                log.warning("worker %s died; %s goes to another one", worker, job_id)
        self._fill_pool()
        self._wake.set()

    def _dismiss_if_done(self, worker: str) -> None:
        if self._room.is_done(worker):
            self._dismiss(worker)

    def _dismiss(self, worker: str) -> None:
        """End a worker's process. One that is frozen ends when it wakes."""
        if handle := self._handles.get(worker):
            ray.kill(handle)
        else:
            self._room.remove(worker)

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _cluster() -> tuple[dict[str, float], list[dict[str, Any]]]:
    """What is free in the cluster, and its living nodes."""
    available: dict[str, float] = {**ray.available_resources()}
    return available, [node for node in ray.nodes() if node["Alive"]]


def _by_worker(claims: list[Claim]) -> dict[str, list[Claim]]:
    groups: dict[str, list[Claim]] = {}
    for one in claims:
        groups.setdefault(one.worker, []).append(one)
    return groups
