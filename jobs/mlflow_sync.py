"""Send the journal of tracked jobs to MLflow, in order, from a stored cursor.

Everything that is sent is in the journal already, so MLflow may be slow or unavailable without an effect on jobs.
"""

import asyncio
import json
import logging
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

from sqlalchemy import func, select, update
from sqlalchemy.exc import SQLAlchemyError

from cluster import logs, mlflow_client, storage
from cluster.db import Database
from cluster.mlflow_client import MlflowRestClient, MlflowUnavailable
from cluster.settings import get_settings
from jobs.states import FINISHED, State
from jobs.tables import Job, JobEvent, Leadership

log = logging.getLogger(__name__)

PAGE_SIZE = 500
IDLE_SECONDS = 5.0
MAX_WAIT_SECONDS = 60.0

RUN_STATUS = {
    State.QUEUED: "SCHEDULED",
    State.RUNNING: "RUNNING",
    State.PAUSED: "SCHEDULED",
    State.SUCCEEDED: "FINISHED",
    State.FAILED: "FAILED",
    State.CANCELLED: "KILLED",
}


class MlflowSync:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def sync_forever(self) -> None:
        uri = get_settings().mlflow_uri
        if uri is None:
            return
        wait = 1.0
        async with mlflow_client.connect(uri) as mlflow:
            while True:
                try:
                    has_more = await self._sync_page(mlflow)
                    wait = 1.0
                    await asyncio.sleep(0 if has_more else IDLE_SECONDS)
                except (MlflowUnavailable, SQLAlchemyError) as error:
                    log.warning("the journal could not be sent to MLflow; trying again in %.0f s: %s", wait, error)
                    await asyncio.sleep(wait)
                    wait = min(wait * 2, MAX_WAIT_SECONDS)

    async def _sync_page(self, mlflow: MlflowRestClient) -> bool:
        """Send the next page of events. Returns whether there may be more."""
        async with self._database.read_transaction() as session:
            synced_until = await session.scalar(select(Leadership.tracked_until)) or 0
            newest = await session.scalar(select(func.max(JobEvent.id))) or 0
            if newest <= synced_until:
                return False
            rows = await session.execute(
                select(JobEvent, Job)
                .join(Job, Job.id == JobEvent.job_id)
                .where(JobEvent.id > synced_until, JobEvent.id <= newest, Job.tracked)
                .order_by(JobEvent.id)
                .limit(PAGE_SIZE)
            )
            page = [(event, job) for event, job in rows.all()]
        for _, group in groupby(sorted(page, key=lambda row: (row[1].id, row[0].id)), key=lambda row: row[1].id):
            events = list(group)
            await self._sync_job(mlflow, events[0][1], [event for event, _ in events])
        synced_until = page[-1][0].id if len(page) == PAGE_SIZE else newest
        async with self._database.transaction() as session:
            await session.execute(update(Leadership).values(tracked_until=synced_until))
        return len(page) == PAGE_SIZE

    async def _sync_job(self, mlflow: MlflowRestClient, job: Job, events: list[JobEvent]) -> None:
        """Send the new events of one job. What MLflow refuses is logged and skipped; it would be refused again."""
        try:
            run_id = job.mlflow_run_id or await self._create_run(mlflow, job)
            await mlflow.log_metrics(run_id, [metric for event in events for metric in _metrics(event)])
            for event in events:
                await self._sync_event(mlflow, run_id, event)
            states = [event for event in events if event.type in set(State)]
            if states:
                await self._sync_state(mlflow, run_id, job, states[-1])
        except (MlflowUnavailable, SQLAlchemyError):
            raise
        except Exception:
            log.exception("not everything of %s could be sent to MLflow", job.id)

    async def _sync_event(self, mlflow: MlflowRestClient, run_id: str, event: JobEvent) -> None:
        """Send an artifact or an input. If that fails, the other events are still sent."""
        try:
            if event.type == "artifact":
                await _upload(mlflow, run_id, event)
            if event.type == "input":
                await mlflow.log_input(run_id, **event.data)
        except MlflowUnavailable:
            raise
        except Exception:
            log.exception("an event '%s' of %s could not be sent to MLflow", event.type, event.job_id)

    async def _create_run(self, mlflow: MlflowRestClient, job: Job) -> str:
        experiment = await mlflow.find_or_create_experiment(job.kind)
        address = f"{get_settings().url}/api/v1/jobs/{job.id}"
        tags = {
            "mlflow.user": job.created_by,
            "mlflow.source.name": "forgearr",
            "mlflow.note.content": f"[{job.id}]({address}), a `{job.kind}` job of {job.created_by}.",
            "forgearr.kind": job.kind,
        }
        run_id = await mlflow.find_or_create_run(experiment, job.id, job.started_at or job.created_at, tags)
        await mlflow.log_parameters(run_id, mlflow_client.flatten(logs.redact_document(job.spec)))
        async with self._database.transaction() as session:
            await session.execute(update(Job).where(Job.id == job.id).values(mlflow_run_id=run_id))
        job.mlflow_run_id = run_id
        return run_id

    async def _sync_state(self, mlflow: MlflowRestClient, run_id: str, job: Job, event: JobEvent) -> None:
        state = State(event.type)
        tags: dict[str, Any] = {
            "forgearr.state": state,
            "forgearr.attempt": event.data.get("attempt", job.attempt),
        }
        if state in FINISHED:
            if job.error:
                tags["forgearr.error"] = job.error.get("message")
            result = json.dumps(logs.redact_document(job.result), indent=2)
            await mlflow.upload(run_id, "result.json", result.encode())
        await mlflow.set_tags(run_id, tags)
        await mlflow.set_status(run_id, RUN_STATUS[state], event.created_at if state in FINISHED else None)


async def _upload(mlflow: MlflowRestClient, run_id: str, event: JobEvent) -> None:
    """Copy an artifact from disk to disk, because it may be larger than the dispatcher's memory."""
    with tempfile.TemporaryDirectory() as folder:
        path = await asyncio.to_thread(storage.fetch, event.data["address"], Path(folder))
        await mlflow.upload(run_id, event.data["name"], path)


def _metrics(event: JobEvent) -> list[tuple[str, float, Any, int]]:
    """Return the metrics of a progress event. The one named `step` is the step of the others."""
    if event.type != "progress":
        return []
    reported = event.data.get("metrics", {})
    numbers = {name: value for name, value in reported.items() if isinstance(value, int | float)}
    step = int(numbers.pop("step", 0))
    if "progress" in event.data:
        numbers["progress"] = event.data["progress"]
    return [(name, float(value), event.created_at, step) for name, value in numbers.items()]
