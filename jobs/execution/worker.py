"""A worker: a Ray actor that runs jobs in threads, each with its lease, its limits and its outcome.

The actor's event loop never waits for a job. What jobs report goes through jobs/execution/report_writer.py.
"""

import asyncio
import contextlib
import itertools
import logging
import os
import time
from collections.abc import Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from cluster import actors, logs, storage
from cluster.db import get_database
from cluster.errors import Unavailable
from cluster.runtime.processes import stand_back
from cluster.settings import get_settings
from jobs import leases, queue
from jobs.context import Context, JobLogHandler, Park, Stop, StopReason, current
from jobs.execution.report_writer import LONGEST_WAIT_SECONDS, News, Writer, outcome_news, storable
from jobs.leases import Claim
from jobs.registry import Resources, find_kind, load_function
from jobs.retry_policy import Failure, backoff, judge
from jobs.states import Control
from jobs.tables import Job

log = logging.getLogger(__name__)


class Running:
    """A job that this worker holds."""

    def __init__(self, claim: Claim, worker: "Worker") -> None:
        self.claim = claim
        self.context = Context(claim, worker)
        self.started = time.monotonic()
        self.stop_asked: float | None = None
        self.settled = False
        """Its outcome is being written, or is not ours to write: nothing that its thread still says counts."""

    def ask_to_stop(self, reason: StopReason | None) -> None:
        self.context.stop(reason)
        if reason is None or reason == "pause":
            self.stop_asked = None
        elif self.stop_asked is None:
            self.stop_asked = time.monotonic()


class Worker:
    """The actor. The dispatcher calls its public coroutines; the contexts of its jobs call the rest, from threads."""

    def __init__(self, name: str, slots: int) -> None:
        logs.configure("worker")
        logging.getLogger().addHandler(JobLogHandler())
        self._name = name
        self._database = get_database()
        self._settings = get_settings().jobs
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="job", initializer=stand_back)
        self._running: dict[str, Running] = {}  # by token
        self._freed: list[str] = []
        self._loop = asyncio.get_running_loop()
        self._writer = Writer(self._database, self._lose)
        self._tasks: set[asyncio.Task[None]] = set()
        for work in (self._writer.write_forever(), self._beat_forever()):
            self._keep(work).add_done_callback(_die)

    async def run(self, claims: list[Claim]) -> None:
        """Start these jobs. Their outcomes go to the database, and word of them to the dispatcher."""
        for claim in claims:
            running = self._running[claim.token] = Running(claim, self)
            self._loop.run_in_executor(self._threads, self._run, running)

    async def control(self, job_id: str, control: str | None) -> None:
        """Pass on what somebody has asked of a job."""
        for running in self._running.values():
            if running.claim.job_id == job_id:
                self._hear(running, control)

    async def jobs(self) -> list[str]:
        return [running.claim.job_id for running in self._running.values()]

    # Called by processes that a job has started elsewhere, through their contexts (jobs/execution/remote_context.py).

    async def report_of(self, claim: Claim, values: Mapping[str, Any], news: News) -> None:
        if running := self._running.get(claim.token):
            running.context.last_sign = time.monotonic()
            self._writer.gather(claim, values, news)

    async def checkpoint_of(self, claim: Claim, state: Any) -> bool:
        """Whether it is saved: not when the job is no longer ours."""
        if running := self._running.get(claim.token):
            running.context.last_sign = time.monotonic()
            return await self._writer.write(claim, {"checkpoint": state}, ("checkpoint", {"state": state}))
        return False

    async def stop_reason_of(self, claim: Claim) -> StopReason | None:
        running = self._running.get(claim.token)
        return running.context.stop_reason if running else "lease_lost"

    async def until_death(self) -> None:
        """Never returns, and fails when this process dies: how the dispatcher watches it."""
        await asyncio.Event().wait()

    # Called by the jobs' threads, through their contexts.

    def report(self, claim: Claim, values: Mapping[str, Any], news: News) -> None:
        self._writer.gather(claim, storable(values), storable(news))

    def checkpoint(self, claim: Claim, state: Any) -> None:
        state = storable(state)
        writing = self._writer.write(claim, {"checkpoint": state}, ("checkpoint", {"state": state}))
        if not asyncio.run_coroutine_threadsafe(writing, self._loop).result():
            raise Stop("lease_lost")

    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        address = storage.save(path, f"jobs/{claim.job_id}/{name}")
        self._writer.gather(claim, {}, ("artifact", {"name": name, "address": address, "bytes": path.stat().st_size}))
        return address

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None) -> Job:
        child = self._child(claim, name, kind, spec, resources)
        return asyncio.run_coroutine_threadsafe(child, self._loop).result()

    def _run(self, running: Running) -> None:
        """The life of one attempt, in its own thread."""
        claim = running.claim
        current.set(running.context)
        logs.job_id.set(claim.job_id)
        try:
            kind = find_kind(claim.kind)
            function = load_function(kind.entrypoint)
            result = function(running.context, kind.spec.model_validate(claim.spec))
            ending = self._settle(claim, leases.succeeded(storable(result)))
        except Park as park:
            ending = self._park(claim, park.children)
        except Stop as stop:
            ending = self._settle(claim, _stopped(claim, stop.reason))
        except BaseException as error:
            log.info("%s failed", claim.job_id, exc_info=True)
            failure = judge(error, claim.attempt)
            ending = self._settle(claim, leases.failed(failure, claim.attempt, claim.max_attempts))
        finally:
            current.set(None)
            logs.job_id.set(None)
        self._loop.call_soon_threadsafe(self._end, running, ending)

    # On the event loop again.

    def _end(self, running: Running, ending: Coroutine[Any, Any, None]) -> None:
        """Let a job end in this way, unless it has been settled in another one."""
        if running.settled:
            ending.close()
            return
        running.settled = True
        self._keep(ending)

    async def _settle(self, claim: Claim, values: Mapping[str, Any] | None) -> None:
        """Write the outcome, then forget the job and tell the dispatcher that there is room."""
        if values is not None:
            await self._writer.write(claim, values, outcome_news(values))
        self._forget(claim)

    async def _park(self, claim: Claim, children: list[str]) -> None:
        await self._writer.write(claim, {})
        for attempt in itertools.count(1):
            try:
                async with self._writer.one_at_a_time, self._database.transaction() as session:
                    await leases.park(session, claim.job_id, claim.token, children)
                break
            except SQLAlchemyError:
                log.warning("%s could not be parked; trying again", claim.job_id, exc_info=True)
                await asyncio.sleep(min(backoff(attempt), LONGEST_WAIT_SECONDS))
        self._forget(claim)

    async def _child(
        self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any], resources: Resources | None
    ) -> Job:
        async with self._database.transaction() as session:
            parent = await session.get_one(Job, claim.job_id, with_for_update={"key_share": True})
            if parent.lease_token != claim.token:
                raise Stop("lease_lost")
            if parent.control == Control.CANCEL:
                raise Stop("cancel")
            return await queue.enqueue_child(session, parent, name, kind, dict(spec), resources)

    def _forget(self, claim: Claim) -> None:
        if not self._freed:
            self._loop.call_soon(self._tell_freed)
        self._freed.append(claim.job_id)
        self._running.pop(claim.token, None)

    def _tell_freed(self) -> None:
        freed, self._freed = self._freed, []
        with contextlib.suppress(Unavailable):
            actors.find(queue.DISPATCHER).released.remote(self._name, freed)

    async def _beat_forever(self) -> None:
        """Keep the jobs to their limits, and renew their leases in time."""
        pause = min(1.0, self._settings.lease_seconds / 3)
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(pause)
            self._enforce_limits()
            if self._running and time.monotonic() - renewed >= self._settings.lease_seconds / 3 - pause:
                renewed = time.monotonic()
                await self._renew()

    async def _renew(self) -> None:
        """Renew the leases, and hear on the way what was asked of the jobs, and which of them are ours no more."""
        before = list(self._running.values())
        try:
            async with self._writer.one_at_a_time, self._database.transaction() as session:
                held = await leases.renew(session, [running.claim.token for running in before])
        except SQLAlchemyError:
            log.warning("the leases could not be renewed; trying again", exc_info=True)
            return
        for running in before:
            if running.claim.token in held:
                self._hear(running, held[running.claim.token])
            elif not running.settled:
                self._lose(running.claim.token)

    def _hear(self, running: Running, control: str | None) -> None:
        """A wish may be taken back, but not a cancel, and no wish takes back a limit or a lost lease."""
        reason: StopReason | None = None if control is None else "cancel" if control == Control.CANCEL else "pause"
        if running.context.stop_reason in {None, "pause"} and running.context.stop_reason != reason:
            running.ask_to_stop(reason)

    def _enforce_limits(self) -> None:
        moment = time.monotonic()
        for running in list(self._running.values()):
            claim = running.claim
            if running.stop_asked is None:
                if claim.time_limit and moment - running.started > claim.time_limit:
                    running.ask_to_stop("time_limit")
                elif claim.stall_limit and moment - running.context.last_sign > claim.stall_limit:
                    running.ask_to_stop("stall_limit")
            elif moment - running.stop_asked > self._settings.stop_grace_seconds and not running.settled:
                self._abandon(running)

    def _abandon(self, running: Running) -> None:
        """The function does not listen: settle the job without it, and have this process replaced to be rid of it."""
        self._end(
            running, self._settle(running.claim, _stopped(running.claim, running.context.stop_reason or "cancel"))
        )
        with contextlib.suppress(Unavailable):
            actors.find(queue.DISPATCHER).retire.remote(self._name)

    def _lose(self, token: str) -> None:
        if running := self._running.get(token):
            log.warning("the lease of %s was lost; its work here is dropped", running.claim.job_id)
            running.ask_to_stop("lease_lost")
            running.settled = True
            self._forget(running.claim)

    def _keep(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


def _die(task: asyncio.Task[None]) -> None:
    """A worker that has gone deaf or dumb is worse than a dead one, which is replaced."""
    log.critical("this worker cannot go on", exc_info=None if task.cancelled() else task.exception())
    os._exit(1)


def _stopped(claim: Claim, reason: StopReason) -> dict[str, Any] | None:
    """What a stop for this reason makes of the job; None when it is no longer ours to say."""
    match reason:
        case "cancel":
            return leases.cancelled()
        case "pause":
            return leases.paused()
        case "lease_lost":
            return None
        case "time_limit":
            code, message = "time_limit", f"It ran longer than its limit of {claim.time_limit:g} s."
        case "stall_limit":
            code, message = "stalled", f"It gave no sign for {claim.stall_limit:g} s."
    return leases.failed(Failure(code, message, backoff(claim.attempt)), claim.attempt, claim.max_attempts)
