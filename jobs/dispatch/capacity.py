"""The capacity for jobs: slots of warm workers for light jobs, the cluster's resources for heavy ones."""

import math
import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.leases import OWN_WORKER
from jobs.registry import LIGHT, Resources
from jobs.tables import Job

POOL_PREFIX, HEAVY_PREFIX = "worker-", "heavy-"
"""The prefixes of the names of warm and heavy workers."""
MAX_HEAVY_STARTS = 64
"""Maximum number of heavy jobs that one round starts."""
MAX_OWN_WORKERS = 4
"""Maximum number of light jobs with a worker of their own, because they lost the workers that they shared."""
PROCESSES_PER_CPU = 4
"""Maximum number of processes of heavy jobs for each CPU of the cluster. A job may ask for a ten-thousandth of a CPU,
but each process has an interpreter and its libraries in memory."""


@dataclass
class WorkerCapacity:
    """The capacity of a worker: the slots of a warm one, or the resources of the one job of a heavy one."""

    slots: int
    resources: Resources | None = None
    jobs: dict[str, float] = field(default_factory=dict[str, float])  # with the time at which each was added
    retired: bool = False

    @property
    def free_slots(self) -> int:
        return 0 if self.retired else self.slots - len(self.jobs)


class ClusterCapacity:
    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._workers: dict[str, WorkerCapacity] = {}
        self._available: dict[str, float] = {}
        self._nodes: list[tuple[dict[str, float], dict[str, str]]] = []
        self._is_view_fresh = False
        self.avoided_nodes: set[str] = set()
        """The ids of nodes with another version of Forgearr. No worker is placed there."""

    def update_cluster(self, available: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> None:
        """Store what is free in the cluster, and what its nodes have in total, as Ray reports it."""
        self._available = dict(available)
        usable = [node for node in nodes if node["NodeID"] not in self.avoided_nodes]
        self._nodes = [(dict(node["Resources"]), dict(node["Labels"])) for node in usable]
        self._is_view_fresh = True

    def mark_view_used(self) -> None:
        """Record that a round has used this view of the cluster. The next one claims heavy jobs only on a new view."""
        self._is_view_fresh = False

    def add(self, worker: str, resources: Resources | None = None) -> None:
        """Add a warm worker, or with `resources` the worker of a heavy job."""
        self._workers[worker] = WorkerCapacity(1 if resources else self._slots, resources)

    def remove(self, worker: str) -> None:
        self._workers.pop(worker, None)

    def occupy(self, worker: str, job_id: str) -> None:
        self._workers[worker].jobs[job_id] = time.monotonic()

    def release(self, worker: str, job_id: str) -> None:
        if worker_capacity := self._workers.get(worker):
            worker_capacity.jobs.pop(job_id, None)

    def reconcile(self, running: Mapping[str, Sequence[str]], grace_seconds: float) -> None:
        """Release jobs that do not run any more, if they were added `grace_seconds` ago: the message was lost."""
        for worker, worker_capacity in self._workers.items():
            ended_ids = worker_capacity.jobs.keys() - set(running.get(worker, ()))
            for job_id in [
                job_id for job_id in ended_ids if time.monotonic() - worker_capacity.jobs[job_id] > grace_seconds
            ]:
                del worker_capacity.jobs[job_id]

    def retire(self, worker: str) -> None:
        """Give this worker no more jobs."""
        if worker_capacity := self._workers.get(worker):
            worker_capacity.retired = True

    def workers(self) -> list[str]:
        return list(self._workers)

    def resources_of(self, worker: str) -> Resources | None:
        """Return the resources of a heavy worker. None: it is a warm worker, or it is gone."""
        worker_capacity = self._workers.get(worker)
        return worker_capacity.resources if worker_capacity else None

    def is_done(self, worker: str) -> bool:
        """Whether the worker's process is no longer needed: a heavy or retired worker without jobs."""
        worker_capacity = self._workers.get(worker)
        return (
            worker_capacity is not None
            and not worker_capacity.jobs
            and (worker_capacity.retired or worker_capacity.resources is not None)
        )

    def pool_size(self) -> int:
        return sum(
            worker_capacity.resources is None and not worker_capacity.retired
            for worker_capacity in self._workers.values()
        )

    # The protocol `leases.Capacity`, which `claim_jobs` calls.

    def available_slots(self, *, heavy: bool) -> int:
        if heavy:
            return MAX_HEAVY_STARTS if self._is_view_fresh else 0
        return sum(
            worker_capacity.free_slots
            for worker_capacity in self._workers.values()
            if worker_capacity.resources is None
        )

    def allocate(self, job: Job) -> str | None:
        if not job.demand:
            pool = [
                (name, worker_capacity)
                for name, worker_capacity in self._workers.items()
                if worker_capacity.resources is None and worker_capacity.free_slots > 0
            ]
            if not pool:
                return None
            name, _ = max(pool, key=lambda item: item[1].free_slots)
            self.occupy(name, job.id)
            return name
        resources = Resources.model_validate(job.resources)
        if not self._fits(resources):
            return None
        name = f"{HEAVY_PREFIX}{secrets.token_hex(4)}"
        self.add(name, resources)
        self.occupy(name, job.id)
        return name

    def wait_reason(self, demand: str) -> str:
        if demand == OWN_WORKER:
            return OWN_WORKER
        if not demand:
            return f"one of the {self._slots * self.pool_size()} slots for light jobs to be free"
        totals = _sum_resources(*(resources for resources, _ in self._nodes))
        cluster_total = (
            f"{totals.get('CPU', 0):g} CPU, {totals.get('GPU', 0):g} GPU, {_megabytes(totals):.0f} MB memory, "
            f"{_max_processes(totals)} processes"
        )
        return f"{demand}; the cluster has {cluster_total} in all, and not enough of it free"

    def _fits(self, requested: Resources) -> bool:
        """Whether a node is large enough and has the labels, and enough of the cluster is free.

        What is free is checked by Ray's numbers and by our own, because Ray needs a moment to count a new actor.
        """
        per_worker, all_workers = ray_resources(requested), ray_resources(requested, requested.workers)
        suitable = [
            total
            for total, labels in self._nodes
            if requested.labels.items() <= labels.items() and _covers(total, per_worker)
        ]
        if (
            requested == LIGHT
            and sum(worker_capacity.resources == LIGHT for worker_capacity in self._workers.values()) >= MAX_OWN_WORKERS
        ):
            return False
        totals = _sum_resources(*(resources for resources, _ in self._nodes))
        occupied = [
            worker_capacity.resources for worker_capacity in self._workers.values() if worker_capacity.resources
        ]
        if sum(resources.workers for resources in occupied) + requested.workers > _max_processes(totals):
            return False
        allocated = _sum_resources(*(ray_resources(resources, resources.workers) for resources in occupied))
        unallocated = {name: total - allocated.get(name, 0) for name, total in totals.items()}
        return bool(suitable) and _covers(unallocated, all_workers) and _covers(self._available, all_workers)


def ray_resources(resources: Resources, workers: int = 1) -> dict[str, float]:
    """Return what this many workers of a job occupy, by Ray's names."""
    amounts = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_mb * 1024 * 1024}
    return {name: workers * amount for name, amount in amounts.items() if amount}


def actor_options(resources: Resources) -> dict[str, Any]:
    """Return Ray's options for the actor of a heavy job. If it has more than one worker, the actor occupies nothing."""
    # Ray leaves all GPUs visible to an actor without GPUs. The processes that it starts inherit this variable.
    hide_gpus = {} if resources.gpus else {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
    if resources.workers > 1:
        return {"num_cpus": 0, **hide_gpus}
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, **hide_gpus}
    if resources.memory_mb:
        options["memory"] = resources.memory_mb * 1024 * 1024
    if resources.labels:
        options["label_selector"] = dict(resources.labels)
    return options


def placed_elsewhere(options: Mapping[str, Any], avoided_nodes: Collection[str]) -> dict[str, Any]:
    """Return Ray's options for an actor, so that it is placed on none of these nodes."""
    if not avoided_nodes:
        return dict(options)
    elsewhere = {"ray.io/node-id": f"!in({','.join(sorted(avoided_nodes))})"}
    return {**options, "label_selector": {**options.get("label_selector", {}), **elsewhere}}


def _max_processes(totals: Mapping[str, float]) -> int:
    return max(MAX_OWN_WORKERS, int(PROCESSES_PER_CPU * totals.get("CPU", 0)))


def _covers(available: Mapping[str, float], required: Mapping[str, float]) -> bool:
    return all(available.get(name, 0) + 1e-9 >= amount for name, amount in required.items())


def _sum_resources(*parts: Mapping[str, float]) -> dict[str, float]:
    names = {name for part in parts for name in part}
    return {name: math.fsum(part.get(name, 0) for part in parts) for name in names}


def _megabytes(resources: Mapping[str, float]) -> float:
    return resources.get("memory", 0) / 1024 / 1024
