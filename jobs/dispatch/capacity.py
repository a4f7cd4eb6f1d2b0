"""Where there is room for jobs: slots of warm workers for light ones, the cluster's resources for heavy ones."""

import math
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs.leases import ALONE
from jobs.registry import LIGHT, Resources
from jobs.tables import Job

POOLED, HEAVY = "worker-", "heavy-"
"""How the names of the two sorts of worker begin."""
HEAVY_AT_ONCE = 64
"""How many heavy jobs one look at the queue may start."""
ALONE_AT_ONCE = 4
"""How many light jobs may have a worker of their own, for having lost those that they shared."""


@dataclass
class Place:
    """A worker's room: the slots of a pooled one, or the resources of the one job that a heavy one is for."""

    slots: int
    resources: Resources | None = None
    jobs: dict[str, float] = field(default_factory=dict[str, float])  # and when each came
    retired: bool = False

    @property
    def free(self) -> int:
        return 0 if self.retired else self.slots - len(self.jobs)


class Room:
    def __init__(self, slots: int) -> None:
        self._slots = slots
        self._places: dict[str, Place] = {}
        self._available: dict[str, float] = {}
        self._nodes: list[tuple[dict[str, float], dict[str, str]]] = []
        self._view_is_new = False

    def see_cluster(self, available: Mapping[str, float], nodes: Sequence[Mapping[str, Any]]) -> None:
        """Take in what Ray says is free, and what its nodes have in all."""
        self._available = dict(available)
        self._nodes = [(dict(node["Resources"]), dict(node["Labels"])) for node in nodes]
        self._view_is_new = True

    def looked(self) -> None:
        """The queue was looked through: heavy jobs that did not fit wait for a new view of the cluster."""
        self._view_is_new = False

    def add(self, worker: str, resources: Resources | None = None) -> None:
        """A worker of the pool, or with `resources` one of its own for a heavy job."""
        self._places[worker] = Place(1 if resources else self._slots, resources)

    def remove(self, worker: str) -> None:
        self._places.pop(worker, None)

    def occupy(self, worker: str, job_id: str) -> None:
        self._places[worker].jobs[job_id] = time.monotonic()

    def release(self, worker: str, job_id: str) -> None:
        if place := self._places.get(worker):
            place.jobs.pop(job_id, None)

    def reconcile(self, running: Mapping[str, Sequence[str]], seconds: float) -> None:
        """Let go of jobs that came so many seconds ago and run no more: word of their end was lost."""
        for worker, place in self._places.items():
            gone = place.jobs.keys() - set(running.get(worker, ()))
            for job_id in [job_id for job_id in gone if time.monotonic() - place.jobs[job_id] > seconds]:
                del place.jobs[job_id]

    def retire(self, worker: str) -> None:
        """No more jobs for this one."""
        if place := self._places.get(worker):
            place.retired = True

    def workers(self) -> list[str]:
        return list(self._places)

    def resources_of(self, worker: str) -> Resources | None:
        """What a heavy worker was made for; None for one of the pool, or one that is gone."""
        place = self._places.get(worker)
        return place.resources if place else None

    def is_done(self, worker: str) -> bool:
        """Whether the worker's process has nothing more to do here: a heavy one or a retired one without jobs."""
        place = self._places.get(worker)
        return place is not None and not place.jobs and (place.retired or place.resources is not None)

    def pool_size(self) -> int:
        return sum(place.resources is None and not place.retired for place in self._places.values())

    # What the queue asks when it claims: leases.Capacity.

    def room(self, *, heavy: bool) -> int:
        if heavy:
            return HEAVY_AT_ONCE if self._view_is_new else 0
        return sum(place.free for place in self._places.values() if place.resources is None)

    def take(self, job: Job) -> str | None:
        if not job.demand:
            pool = [(name, place) for name, place in self._places.items() if place.resources is None and place.free > 0]
            if not pool:
                return None
            name, _ = max(pool, key=lambda item: item[1].free)
            self.occupy(name, job.id)
            return name
        resources = Resources.model_validate(job.resources)
        if not self._fits(resources):
            return None
        name = f"{HEAVY}{secrets.token_hex(4)}"
        self.add(name, resources)
        self.occupy(name, job.id)
        return name

    def shortage(self, demand: str) -> str:
        if demand == ALONE:
            return ALONE
        if not demand:
            return f"one of the {self._slots * self.pool_size()} slots for light jobs to be free"
        totals = _plus(*(resources for resources, _ in self._nodes))
        have = f"{totals.get('CPU', 0):g} CPU, {totals.get('GPU', 0):g} GPU, {_megabytes(totals):.0f} MB memory"
        return f"{demand}; the cluster has {have} in all, and not enough of it free"

    def _fits(self, wanted: Resources) -> bool:
        """Some node is large enough and carries the labels, and what it needs is free: both as Ray says and as we
        reckon ourselves, since Ray needs a moment to count an actor that has just started."""
        one, needs = needed(wanted), needed(wanted, wanted.workers)
        suitable = [
            total for total, labels in self._nodes if wanted.labels.items() <= labels.items() and _covers(total, one)
        ]
        if wanted == LIGHT and sum(place.resources == LIGHT for place in self._places.values()) >= ALONE_AT_ONCE:
            return False
        totals = _plus(*(resources for resources, _ in self._nodes))
        places = [place.resources for place in self._places.values() if place.resources]
        ours = _plus(*(needed(resources, resources.workers) for resources in places))
        left = {name: total - ours.get(name, 0) for name, total in totals.items()}
        return bool(suitable) and _covers(left, needs) and _covers(self._available, needs)


def needed(resources: Resources, workers: int = 1) -> dict[str, float]:
    """What so many workers of a job take, in Ray's words."""
    wanted = {"CPU": resources.cpus, "GPU": resources.gpus, "memory": resources.memory_mb * 1024 * 1024}
    return {name: workers * amount for name, amount in wanted.items() if amount}


def actor_options(resources: Resources) -> dict[str, Any]:
    """What Ray is told when the actor of a heavy job is made. One that has several workers takes nothing itself."""
    # Ray leaves all GPUs visible to an actor that asked for none; the processes that it starts inherit this.
    hidden = {} if resources.gpus else {"runtime_env": {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}}
    if resources.workers > 1:
        return {"num_cpus": 0, **hidden}
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, **hidden}
    if resources.memory_mb:
        options["memory"] = resources.memory_mb * 1024 * 1024
    if resources.labels:
        options["label_selector"] = resources.labels
    return options


def _covers(available: Mapping[str, float], needs: Mapping[str, float]) -> bool:
    return all(available.get(name, 0) + 1e-9 >= amount for name, amount in needs.items())


def _plus(*parts: Mapping[str, float]) -> dict[str, float]:
    names = {name for part in parts for name in part}
    return {name: math.fsum(part.get(name, 0) for part in parts) for name in names}


def _megabytes(resources: Mapping[str, float]) -> float:
    return resources.get("memory", 0) / 1024 / 1024
