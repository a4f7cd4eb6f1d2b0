"""A worker link for jobs that run without a worker."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from cluster import storage
from cluster.db import Database
from cluster.settings import get_settings
from jobs import leases
from jobs.context import StopJob
from jobs.execution.report_writer import JournalEvent, to_storable
from jobs.leases import Claim, GuardedWrite
from jobs.registry import Resources
from jobs.tables import Job

Result = TypeVar("Result")


class RecordingLink:
    """Records the reports of a job. Artifacts go to storage."""

    def __init__(self) -> None:
        self.events: list[JournalEvent] = []
        self.checkpoints: list[Any] = []
        self.on_report: Callable[[str], None] = lambda phase: None

    def report(self, claim: Claim, values: Mapping[str, Any], event: JournalEvent) -> None:
        self.events.append(event)
        self.on_report(values.get("phase") or "")

    def checkpoint(self, claim: Claim, state: Any) -> None:
        self.checkpoints.append(to_storable(state))

    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        return storage.save(path, claim.storage_name(name))

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        raise AssertionError("these jobs have no children")

    @property
    def logged(self) -> list[str]:
        return [data["message"] for kind, data in self.events if kind == "log"]

    @property
    def inputs(self) -> list[str]:
        return [data["name"] for kind, data in self.events if kind == "input"]

    @property
    def progress(self) -> list[float]:
        return [data["progress"] for _, data in self.events if "progress" in data]

    @property
    def phases(self) -> list[str]:
        return [data["phase"] for _, data in self.events if data.get("phase")]

    @property
    def metrics(self) -> dict[str, float]:
        """The latest value of each metric."""
        return {name: value for _, data in self.events for name, value in data.get("metrics", {}).items()}


async def with_own_database(work: Callable[[Database], Awaitable[Result]]) -> Result:
    """Run `work` with connections of its own, in any event loop of any process."""
    database = Database(get_settings().database_url, pool_size=1)
    try:
        return await work(database)
    finally:
        await database.close()


class GuardedLink(RecordingLink):
    """Stores checkpoints under the lease of the job, as a worker does."""

    def checkpoint(self, claim: Claim, state: Any) -> None:
        write = GuardedWrite(claim.job_id, claim.token, {"checkpoint": to_storable(state)})

        async def apply(database: Database) -> set[str]:
            async with database.transaction() as session:
                return await leases.apply_writes(session, [write])

        if asyncio.run(with_own_database(apply)):
            raise StopJob("lease_lost")
        super().checkpoint(claim, state)
