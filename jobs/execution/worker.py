"""The worker: a Ray actor that runs jobs in threads, renews their leases, enforces their limits, and writes outcomes.

The actor's event loop never waits for a job. Reports of jobs are written by jobs/execution/report_writer.py.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import os
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from cluster import actors, logs, storage
from cluster.db import Database
from cluster.errors import Unavailable
from cluster.runtime.processes import lower_priority
from cluster.settings import get_settings
from jobs import leases, queue
from jobs.context import Context, JobLogHandler, ParkJob, StopJob, StopReason, current_context
from jobs.execution import files
from jobs.execution.remote_context import restore_context
from jobs.execution.report_writer import (
    MAX_WAIT_SECONDS,
    JournalEvent,
    ReportWriter,
    checkpoint_event,
    outcome_event,
    to_storable,
)
from jobs.leases import Claim
from jobs.registry import Resources, find_kind, load_function
from jobs.retry_policy import Failure, backoff, classify_error
from jobs.states import Control, State
from jobs.tables import Job

log = logging.getLogger(__name__)


class RunningJob:
    """A job whose lease this worker holds."""

    def __init__(self, claim: Claim, worker: "Worker") -> None:
        self.claim = claim
        self.context = Context(claim, worker, restore_context)
        self.started = time.monotonic()
        self.stop_requested_at: float | None = None
        self.is_finished = False
        """Its outcome is being written, or its lease is lost: nothing that its thread still does has an effect."""

    def request_stop(self, reason: StopReason | None) -> None:
        self.context.stop(reason)
        if reason is None or reason == "pause":
            self.stop_requested_at = None
        elif self.stop_requested_at is None:
            self.stop_requested_at = time.monotonic()


class Worker:
    """The actor. The dispatcher calls its coroutines; the contexts of its jobs call its other methods, from threads."""

    def __init__(self, name: str, slots: int) -> None:
        logs.configure("worker")
        logging.getLogger().addHandler(JobLogHandler())
        self._name = name
        # Its writes and renewals take turns. The jobs have a pool of their own, because they have their own event loop.
        self._database = Database(get_settings().database_url, pool_size=1)
        self._settings = get_settings().jobs
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="job", initializer=lower_priority)
        self._running: dict[str, RunningJob] = {}  # by token
        self._finished_ids: list[str] = []
        self._renewed_at = -math.inf  # the beginning of the last renewal that succeeded
        self._loop = asyncio.get_running_loop()
        self._writer = ReportWriter(self._database, self._drop_lost_job)
        self._tasks: set[asyncio.Task[None]] = set()
        for coroutine in (self._writer.write_forever(), self._heartbeat_forever()):
            self._start_task(coroutine).add_done_callback(_exit_process)

    async def run(self, claims: list[Claim]) -> None:
        """Start these jobs. Their outcomes are written to the database, and the dispatcher is notified."""
        for claim in claims:
            running = self._running[claim.token] = RunningJob(claim, self)
            self._loop.run_in_executor(self._threads, self._run, running)

    async def control(self, job_id: str, control: str | None) -> None:
        """Apply a control request to a job."""
        for running in self._running.values():
            if running.claim.job_id == job_id:
                self._apply_control(running, control)

    async def jobs(self) -> list[str]:
        return [running.claim.job_id for running in self._running.values()]

    # Called by processes that a job has started elsewhere, through their contexts (jobs/execution/remote_context.py).

    async def report_of(self, claim: Claim, values: Mapping[str, Any], event: JournalEvent) -> None:
        if running := self._running.get(claim.token):
            running.context.last_activity = time.monotonic()
            self._writer.add(claim, values, event)

    async def checkpoint_of(self, claim: Claim, state: Any) -> bool:
        """Save a checkpoint. False: the lease is lost, so it was not saved."""
        if running := self._running.get(claim.token):
            running.context.last_activity = time.monotonic()
            return await self._writer.write(claim, {"checkpoint": state}, checkpoint_event(state))
        return False

    async def stop_reason_of(self, claim: Claim) -> StopReason | None:
        running = self._running.get(claim.token)
        return running.context.stop_reason if running else "lease_lost"

    async def until_death(self) -> None:
        """Never return. The call fails when this process dies, and so the dispatcher notices."""
        await asyncio.Event().wait()

    # Called by the jobs' threads, through their contexts.

    def report(self, claim: Claim, values: Mapping[str, Any], event: JournalEvent) -> None:
        self._writer.add(claim, to_storable(values), to_storable(event))

    def checkpoint(self, claim: Claim, state: Any) -> None:
        state = to_storable(state)
        writing = self._writer.write(claim, {"checkpoint": state}, checkpoint_event(state))
        if not asyncio.run_coroutine_threadsafe(writing, self._loop).result():
            raise StopJob("lease_lost")
        if claim.is_suspect and state != claim.checkpoint:
            raise StopJob("cleared")

    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        address = storage.save(path, claim.storage_name(name))
        self._writer.add(claim, {}, ("artifact", {"name": name, "address": address, "bytes": path.stat().st_size}))
        return address

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        child = self._child(claim, name, kind, spec, resources)
        return asyncio.run_coroutine_threadsafe(child, self._loop).result()

    def _run(self, running: RunningJob) -> None:
        """Run one attempt, in its own thread."""
        claim = running.claim
        current_context.set(running.context)
        logs.job_id.set(claim.job_id)
        try:
            if claim.is_resumed:
                asyncio.run_coroutine_threadsafe(self._remove_unrecorded(claim), self._loop).result()
            kind = find_kind(claim.kind)
            function = load_function(kind.entrypoint)
            result = function(running.context, kind.spec.model_validate(claim.spec))
            outcome = self._finish_job(claim, leases.succeeded_values(to_storable(result)))
        except ParkJob as park:
            outcome = self._park(claim, park.children)
        except StopJob as stop:
            outcome = self._finish_job(claim, _stop_values(claim, stop.reason))
        except BaseException as error:
            log.info("%s failed", claim.job_id, exc_info=True)
            failure = classify_error(error, claim.attempt)
            outcome = self._finish_job(claim, leases.failure_values(failure, claim.attempt, claim.max_attempts))
        finally:
            current_context.set(None)
            logs.job_id.set(None)
        self._loop.call_soon_threadsafe(self._end_once, running, outcome)

    # Called on the event loop.

    def _end_once(self, running: RunningJob, outcome: Coroutine[Any, Any, None]) -> None:
        """Apply an outcome, unless the job has another one already."""
        if running.is_finished:
            outcome.close()
            self._start_task(self._remove_unrecorded(running.claim))
            return
        running.is_finished = True
        self._start_task(outcome)

    async def _finish_job(self, claim: Claim, values: Mapping[str, Any] | None) -> None:
        """Write the outcome, remove the job, and notify the dispatcher of the free slot."""
        recorded = values is not None and await self._writer.write(claim, values, outcome_event(values))
        if claim.is_resumed or not recorded:
            await self._remove_unrecorded(claim)
        self._remove(claim)

    async def _remove_unrecorded(self, claim: Claim) -> None:
        """Delete what ended leases of the job have left in storage."""
        try:
            await files.remove_unrecorded(self._database, claim.job_id)
        except Exception:  # no job depends on it, and the next attempt tries again
            log.warning("the unrecorded files of %s could not be deleted", claim.job_id, exc_info=True)

    async def _park(self, claim: Claim, children: list[str]) -> None:
        await self._writer.write(claim, {})
        for attempt in itertools.count(1):
            try:
                async with self._writer.transaction_lock, self._database.transaction() as session:
                    await leases.park(session, claim.job_id, claim.token, children)
                break
            except SQLAlchemyError:
                log.warning("%s could not be parked; trying again", claim.job_id, exc_info=True)
                await asyncio.sleep(min(backoff(attempt), MAX_WAIT_SECONDS))
        self._remove(claim)

    async def _child(
        self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None
    ) -> Job:
        async with self._database.transaction() as session:
            parent = await session.get_one(Job, claim.job_id, with_for_update={"key_share": True})
            if parent.lease_token != claim.token:
                raise StopJob("lease_lost")
            if parent.control == Control.CANCEL:
                raise StopJob("cancel")
            return await queue.enqueue_child(session, parent, name, kind, dict(spec), resources)

    def _remove(self, claim: Claim) -> None:
        if not self._finished_ids:
            self._loop.call_soon(self._report_finished)
        self._finished_ids.append(claim.job_id)
        self._running.pop(claim.token, None)

    def _report_finished(self) -> None:
        job_ids, self._finished_ids = self._finished_ids, []
        with contextlib.suppress(Unavailable):
            actors.find_actor(queue.DISPATCHER).released.remote(self._name, job_ids)

    async def _heartbeat_forever(self) -> None:
        """Renew the leases of the jobs in time, and enforce their limits, also while a renewal takes long."""
        lease_seconds = self._settings.lease_seconds
        interval = min(1.0, lease_seconds / 6)
        renewal: asyncio.Task[None] | None = None
        while True:
            await asyncio.sleep(interval)
            if renewal is not None and renewal.done():
                renewal.result()  # raises the error that no further attempt can mend
                renewal = None
            is_due = time.monotonic() - self._renewed_at >= lease_seconds / 3 - interval
            if self._running and is_due and renewal is None:
                renewal = self._start_task(self._renew())
                # A process that was frozen asks first whether its leases are still valid.
                await asyncio.wait([renewal], timeout=interval)
            self._stop_expired(lease_seconds - 2 * interval)
            self._enforce_limits()

    async def _renew(self) -> None:
        """Renew the leases, apply the control requests that are found, and drop the jobs whose leases are lost."""
        began, running_jobs = time.monotonic(), list(self._running.values())
        try:
            async with self._writer.transaction_lock, self._database.transaction() as session:
                controls = await leases.renew(session, [running.claim.token for running in running_jobs])
        except SQLAlchemyError as error:
            log.warning("the leases could not be renewed; trying again: %s", error)
            return
        self._renewed_at = began
        for running in running_jobs:
            if running.claim.token in controls:
                self._apply_control(running, controls[running.claim.token])
            elif not running.is_finished:
                self._drop_lost_job(running.claim.token)

    def _apply_control(self, running: RunningJob, control: str | None) -> None:
        """Apply a control request. Only a pause can be withdrawn: not a cancel, a limit or a lost lease."""
        reason: StopReason | None = None if control is None else "cancel" if control == Control.CANCEL else "pause"
        if running.context.stop_reason in {None, "pause"} and running.context.stop_reason != reason:
            running.request_stop(reason)

    def _stop_expired(self, max_seconds: float) -> None:
        """Stop the jobs whose leases could not be renewed for this long, before the dispatcher gives them to others."""
        moment = time.monotonic()
        for running in self._running.values():
            is_expired = moment - max(running.started, self._renewed_at) > max_seconds
            if is_expired and running.stop_requested_at is None and not running.is_finished:
                log.warning("the lease of %s could not be renewed in time; it stops here", running.claim.job_id)
                running.request_stop("lease_expired")

    def _enforce_limits(self) -> None:
        moment = time.monotonic()
        for running in list(self._running.values()):
            claim = running.claim
            if running.stop_requested_at is None:
                if claim.time_limit and moment - running.started > claim.time_limit:
                    running.request_stop("time_limit")
                elif claim.stall_limit and moment - running.context.last_activity > claim.stall_limit:
                    running.request_stop("stall_limit")
            elif moment - running.stop_requested_at > self._settings.stop_grace_seconds and not running.is_finished:
                self._abandon(running)

    def _abandon(self, running: RunningJob) -> None:
        """Finish a job whose function does not stop, and have this process replaced, because its thread still runs."""
        self._end_once(
            running,
            self._finish_job(running.claim, _stop_values(running.claim, running.context.stop_reason or "cancel")),
        )
        with contextlib.suppress(Unavailable):
            actors.find_actor(queue.DISPATCHER).retire.remote(self._name)

    def _drop_lost_job(self, token: str) -> None:
        if running := self._running.get(token):
            log.warning("the lease of %s was lost; its work here is dropped", running.claim.job_id)
            running.request_stop("lease_lost")
            running.is_finished = True
            self._remove(running.claim)

    def _start_task(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _exit_process(task: asyncio.Task[None]) -> None:
    """End this process: a dead worker is replaced, one that cannot write or renew leases is not."""
    log.critical("this worker cannot continue", exc_info=None if task.cancelled() else task.exception())
    os._exit(1)


def _stop_values(claim: Claim, reason: StopReason) -> dict[str, Any] | None:
    """Return the values of a job that was stopped for this reason. None: the lease is lost, so nothing is written."""
    match reason:
        case "cancel":
            return leases.cancelled_values()
        case "pause":
            return leases.paused_values()
        case "lease_lost":
            return None
        case "lease_expired":  # written only if no other worker has the job
            return leases.released_values(State.QUEUED)
        case "cleared":
            return leases.cleared_values()
        case "time_limit":
            code, message = "time_limit", f"It ran longer than its limit of {claim.time_limit:g} s."
        case "stall_limit":
            code, message = "stalled", f"It reported nothing for {claim.stall_limit:g} s."
    return leases.failure_values(Failure(code, message, backoff(claim.attempt)), claim.attempt, claim.max_attempts)
