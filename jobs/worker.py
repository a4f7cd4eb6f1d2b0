"""A worker: a Ray actor that runs jobs in threads and says how they go.

Reports, checkpoints, logs and outcomes of all its jobs are gathered and written together, one transaction at a time:
what comes in while one is under way goes into the next. The actor's event loop never waits for a job.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python
from sqlalchemy.exc import SQLAlchemyError

from cluster import actors, logs, storage
from cluster.db import get_database, is_passing
from cluster.errors import Unavailable
from cluster.settings import get_settings
from jobs import leases, queue
from jobs.context import Context, JobLogHandler, Park, Stop, StopReason, current
from jobs.journal import Entry
from jobs.leases import Claim, Write
from jobs.registry import find_kind, load_function
from jobs.retries import Failure, backoff, judge
from jobs.states import FINISHED, Control
from jobs.tables import Job

REPORT_SECONDS = 0.5
"""How long a report or a log line may wait for others to be written with it."""

log = logging.getLogger(__name__)


class Running:
    """A job that this worker holds."""

    def __init__(self, claim: Claim, link: "Worker") -> None:
        self.claim = claim
        self.context = Context(claim, link)
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
    """The actor. Its public coroutines are what the dispatcher calls; `report`, `checkpoint` and `child` are what the
    jobs' threads call."""

    def __init__(self, name: str, slots: int) -> None:
        logs.configure("worker")
        logging.getLogger().addHandler(JobLogHandler())
        self._name = name
        self._database = get_database()
        self._settings = get_settings().jobs
        self._threads = ThreadPoolExecutor(slots, thread_name_prefix="job")
        self._running: dict[str, Running] = {}
        self._freed: list[str] = []
        self._writes: dict[str, Write] = {}
        self._written: list[asyncio.Future[set[str]]] = []
        self._lock = threading.Lock()
        self._one_transaction = asyncio.Lock()
        self._dirty, self._urgent = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._tasks = [asyncio.create_task(self._write_forever()), asyncio.create_task(self._beat_forever())]

    async def run(self, claims: list[Claim]) -> None:
        """Start these jobs. Their outcomes go to the database, and word of them to the dispatcher."""
        for claim in claims:
            if claim.job_id not in self._running:
                running = self._running[claim.job_id] = Running(claim, self)
                self._loop.run_in_executor(self._threads, self._run, running)

    async def control(self, job_id: str, control: str | None) -> None:
        """Pass on what somebody has asked of a job."""
        if running := self._running.get(job_id):
            self._hear(running, control)

    async def jobs(self) -> list[str]:
        return list(self._running)

    async def until_death(self) -> None:
        """Never returns, and fails when this process dies: how the dispatcher watches it."""
        await asyncio.Event().wait()

    # From here on: called by the jobs' threads.

    def report(self, claim: Claim, values: Mapping[str, Any], entry: tuple[str, dict[str, Any]] | None) -> None:
        self._gather(claim, storable(dict(values)), storable(entry))

    def checkpoint(self, claim: Claim, state: Any) -> None:
        state = storable(state)
        writing = self._write_now(claim, {"checkpoint": state}, ("checkpoint", {"state": state}))
        if claim.job_id in asyncio.run_coroutine_threadsafe(writing, self._loop).result():
            raise Stop("lease_lost")

    def artifact(self, claim: Claim, path: Path, name: str) -> str:
        address = storage.save(path, f"jobs/{claim.job_id}/{name}")
        self._gather(claim, {}, ("artifact", {"name": name, "address": address, "bytes": path.stat().st_size}))
        return address

    def child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any]) -> Job:
        return asyncio.run_coroutine_threadsafe(self._child(claim, name, kind, spec), self._loop).result()

    def _run(self, running: Running) -> None:
        """The life of one attempt, in its own thread."""
        claim = running.claim
        current.set(running.context)
        logs.job_id.set(claim.job_id)
        try:
            function = load_function(claim.entrypoint)
            result = function(running.context, find_kind(claim.kind).spec.model_validate(claim.spec))
            values = leases.succeeded(storable(result))
        except Park as park:
            self._settle_later(running, self._park(running, park.children))
            return
        except Stop as stop:
            values = _stopped(claim, stop.reason)
        except BaseException as error:
            log.info("%s failed", claim.job_id, exc_info=True)
            values = leases.failed(judge(error, claim.attempt), claim.attempt, claim.max_attempts)
        finally:
            current.set(None)
            logs.job_id.set(None)
        self._settle_later(running, self._settle(running, values))

    def _settle_later(self, running: Running, settling: Any) -> None:
        if running.settled:
            settling.close()
        else:
            running.settled = True
            self._loop.call_soon_threadsafe(self._keep, settling)

    # From here on: on the event loop, but for _gather.

    def _keep(self, settling: Any) -> None:
        task = self._loop.create_task(settling)
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)

    async def _settle(self, running: Running, values: Mapping[str, Any] | None) -> None:
        """Write the outcome, then forget the job and tell the dispatcher that there is room."""
        claim = running.claim
        if values is not None:
            await self._write_now(claim, values, _outcome_entry(values))
        self._forget(claim)

    async def _park(self, running: Running, children: list[str]) -> None:
        claim = running.claim
        await self._write_now(claim, {}, None)
        async with self._database.transaction() as session:
            await leases.park(session, claim.job_id, claim.token, children)
        self._forget(claim)

    def _forget(self, claim: Claim) -> None:
        if self._running.pop(claim.job_id, None) is None:
            return
        if not self._freed:
            self._loop.call_soon(self._tell_freed)
        self._freed.append(claim.job_id)

    def _tell_freed(self) -> None:
        freed, self._freed = self._freed, []
        with contextlib.suppress(Unavailable):
            actors.find(queue.DISPATCHER).released.remote(self._name, freed)

    async def _child(self, claim: Claim, name: str, kind: str, spec: Mapping[str, Any]) -> Job:
        async with self._database.transaction() as session:
            parent = await session.get_one(Job, claim.job_id, with_for_update={"key_share": True})
            if parent.lease_token != claim.token:
                raise Stop("lease_lost")
            if parent.control == Control.CANCEL:
                raise Stop("cancel")
            return await queue.enqueue_child(session, parent, name, kind, dict(spec))

    def _gather(self, claim: Claim, values: Mapping[str, Any], entry: tuple[str, dict[str, Any]] | None) -> None:
        with self._lock:
            if not self._writes:
                self._loop.call_soon_threadsafe(self._dirty.set)
            write = self._writes.setdefault(claim.token, Write(claim.job_id, claim.token))
            write.values.update(values)
            if entry is None:
                return
            if _is_mere_progress(entry) and write.entries and _is_mere_progress(write.entries[-1]):
                entry = (entry[0], {**write.entries.pop().data, **entry[1]})
            write.entries.append(Entry(claim.job_id, *entry))

    async def _write_now(
        self, claim: Claim, values: Mapping[str, Any], entry: tuple[str, dict[str, Any]] | None
    ) -> set[str]:
        """Write with the next transaction, and wait for it; returns the jobs whose lease is lost."""
        self._gather(claim, values, entry)
        written: asyncio.Future[set[str]] = self._loop.create_future()
        self._written.append(written)
        self._urgent.set()
        return await written

    async def _write_forever(self) -> None:
        while True:
            await self._dirty.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), REPORT_SECONDS)
            self._dirty.clear()
            self._urgent.clear()
            with self._lock:
                writes, self._writes = list(self._writes.values()), {}
            waiters, self._written = self._written, []
            lost = await self._write(writes) if writes else set[str]()
            for waiter in waiters:
                waiter.set_result(lost)
            for job_id in lost:
                self._lose(job_id)

    async def _write(self, writes: list[Write]) -> set[str]:
        """Until it succeeds: a database that is away for a minute costs time, not work."""
        for attempt in itertools.count(1):
            try:
                async with self._one_transaction, self._database.transaction() as session:
                    return await leases.write(session, writes)
            except SQLAlchemyError as error:
                if not is_passing(error) and len(writes) == 1:
                    writes = [_unstorable(writes[0], error)]
                elif not is_passing(error):  # one of them cannot be stored: do not let it take the others along
                    return set[str]().union(*[await self._write([one]) for one in writes])
                log.warning("%d jobs could not be written; trying again", len(writes), exc_info=error)
            await asyncio.sleep(min(backoff(attempt), self._settings.lease_seconds))
        raise AssertionError("unreachable")

    async def _beat_forever(self) -> None:
        """Renew the leases, hear what was asked, and keep the jobs to their limits."""
        renewed = time.monotonic()
        while True:
            await asyncio.sleep(min(1.0, self._settings.lease_seconds / 3))
            self._enforce_limits()
            if not self._running or time.monotonic() - renewed < self._settings.lease_seconds / 3:
                continue
            renewed = time.monotonic()
            try:
                async with self._one_transaction, self._database.transaction() as session:
                    held = await leases.renew(session, self._name)
            except SQLAlchemyError:
                log.warning("the leases could not be renewed; trying again", exc_info=True)
                continue
            for job_id, running in list(self._running.items()):
                token, control = held.get(job_id, ("", None))
                if token == running.claim.token:
                    self._hear(running, control)
                elif running.started < renewed and not running.settled:
                    self._lose(job_id)

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
        running.settled = True
        reason = running.context.stop_reason or "cancel"
        self._keep(self._settle(running, _stopped(running.claim, reason)))
        with contextlib.suppress(Unavailable):
            actors.find(queue.DISPATCHER).retire.remote(self._name)

    def _lose(self, job_id: str) -> None:
        running = self._running.get(job_id)
        if running is not None:
            log.warning("the lease of %s was lost; its work here is dropped", job_id)
            running.ask_to_stop("lease_lost")
            running.settled = True
            self._forget(running.claim)


def _stopped(claim: Claim, reason: StopReason) -> dict[str, Any] | None:
    """What a stop for this reason makes of the job; None when it is no longer ours to say."""
    match reason:
        case "cancel":
            return leases.cancelled()
        case "pause":
            return leases.paused()
        case "time_limit":
            failure = Failure(
                "time_limit",
                f"It ran longer than its limit of {claim.time_limit:g} s.",
                backoff(claim.attempt),
            )
        case "stall_limit":
            failure = Failure("stalled", f"It gave no sign for {claim.stall_limit:g} s.", backoff(claim.attempt))
        case "lease_lost":
            return None
    return leases.failed(failure, claim.attempt, claim.max_attempts)


def _unstorable(refused: Write, error: SQLAlchemyError) -> Write:
    """What becomes of a job that says something which no database takes."""
    log.error("the state of %s cannot be stored", refused.job_id, exc_info=error)
    failure = Failure("unstorable", f"What the job reports cannot be stored ({type(error).__name__}).")
    values = leases.failed(failure, attempt=1, max_attempts=1)
    return Write(refused.job_id, refused.token, values, [Entry(refused.job_id, *_outcome_entry(values))])


def _is_mere_progress(entry: Entry | tuple[str, dict[str, Any]]) -> bool:
    """A report without numbers is worth keeping only until the next one."""
    kind, data = (entry.type, entry.data) if isinstance(entry, Entry) else entry
    return kind == "progress" and "metrics" not in data


def _outcome_entry(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    data: dict[str, Any] = {"error": values["error"]} if values.get("error") else {}
    if values["state"] not in FINISHED and "attempt" in values:
        data |= {"attempt": values["attempt"], "run_after": values["run_after"].isoformat()}
    return str(values["state"]), data


def storable(value: Any) -> Any:
    """The value as plain JSON that both databases take: NaN is null, and NUL, which PostgreSQL refuses, is replaced."""
    return _without_nul(to_jsonable_python(value, inf_nan_mode="null"))


def _without_nul(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd")
    if isinstance(value, dict):
        return {_without_nul(key): _without_nul(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nul(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
