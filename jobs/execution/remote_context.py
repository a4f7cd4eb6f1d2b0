"""The context of a job in another process that the job has started on Ray. It calls the job's worker.

It notices a stop request, and the death of the worker, within a second.
"""

import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ray
import ray.exceptions

from cluster import storage
from cluster.settings import get_settings
from jobs.context import Context, StopJob
from jobs.execution.report_writer import JournalEvent, to_storable
from jobs.leases import Claim
from jobs.registry import Resources
from jobs.tables import Job

POLL_SECONDS = 1.0


def restore_context(claim: Claim) -> Context:
    """Create the context in the process that has received it."""
    worker = ray.get_actor(claim.worker, namespace=get_settings().ray_namespace)
    context = Context(claim, _RemoteLink(worker), restore_context)
    threading.Thread(target=_poll_stop_reason, args=(worker, claim, context), daemon=True).start()
    return context


class _RemoteLink:
    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def report(self, claim: Claim, values: Mapping[str, Any], event: JournalEvent) -> None:
        self._worker.report_of.remote(claim, to_storable(values), to_storable(event))

    def checkpoint(self, claim: Claim, state: Any) -> None:
        try:
            saved = ray.get(self._worker.checkpoint_of.remote(claim, to_storable(state)))
        except ray.exceptions.RayActorError:
            saved = False
        if not saved:
            raise StopJob("lease_lost")

    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        address = storage.save(path, claim.storage_name(name))
        self.report(claim, {}, ("artifact", {"name": name, "address": address, "bytes": path.stat().st_size}))
        return address

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        raise RuntimeError("only the job's own function can create children, not the processes that it starts")


def _poll_stop_reason(worker: Any, claim: Claim, context: Context) -> None:
    while True:
        try:
            context.stop(ray.get(worker.stop_reason_of.remote(claim)))
        except ray.exceptions.RayActorError:
            return context.stop("lease_lost")
        if context.stop_reason == "lease_lost":
            return
        time.sleep(POLL_SECONDS)
