"""Write the reports of a worker's jobs to the database: together, in one transaction at a time.

What arrives during a transaction is written with the next one, so a hundred jobs that report at the same time cost a
few transactions only. While the database is unavailable, nothing is lost.
"""

import asyncio
import contextlib
import itertools
import logging
import math
import re
import threading
from collections.abc import Callable, Mapping
from typing import Any

import orjson
from pydantic_core import to_jsonable_python
from sqlalchemy.exc import SQLAlchemyError

from cluster.db import Database, is_transient
from jobs import leases
from jobs.journal import JournalEntry
from jobs.leases import Claim, GuardedWrite
from jobs.retry_policy import Failure, backoff
from jobs.states import FINISHED

REPORT_DELAY_SECONDS = 0.5
"""How long a report or a log line may wait, to be written together with others."""
MAX_WAIT_SECONDS = 10.0

UNSTORABLE_CHARACTERS = re.compile("[\\x00\\ud800-\\udfff]")

log = logging.getLogger(__name__)

JournalEvent = tuple[str, dict[str, Any]]
"""Type and data of a journal entry."""


class ReportWriter:
    def __init__(self, database: Database, on_lease_lost: Callable[[str], None]) -> None:
        """`on_lease_lost` is called with the token of each lease that is no longer valid."""
        self._database = database
        self._on_lease_lost = on_lease_lost
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._writes: dict[str, GuardedWrite] = {}  # by token
        self._futures: list[asyncio.Future[set[str]]] = []
        self._dirty, self._urgent = asyncio.Event(), asyncio.Event()
        self.transaction_lock = asyncio.Lock()
        """Held by every transaction on this worker's jobs, so that no two of them can deadlock."""

    def add(self, claim: Claim, values: Mapping[str, Any], event: JournalEvent | None = None) -> None:
        """Write this with the next transaction. It may be called from any thread."""
        with self._lock:
            if not self._writes:
                self._loop.call_soon_threadsafe(self._dirty.set)
            write = self._writes.setdefault(claim.token, GuardedWrite(claim.job_id, claim.token))
            write.values.update(values)
            if event is None:
                return
            entry = JournalEntry(claim.job_id, *event)
            if _is_progress_only(entry) and write.entries and _is_progress_only(write.entries[-1]):
                entry = JournalEntry(claim.job_id, entry.type, {**write.entries.pop().data, **entry.data})
            write.entries.append(entry)

    async def write(self, claim: Claim, values: Mapping[str, Any], event: JournalEvent | None = None) -> bool:
        """Write this now, and wait for it. Returns whether the lease is still valid."""
        self.add(claim, values, event)
        future: asyncio.Future[set[str]] = self._loop.create_future()
        self._futures.append(future)
        self._urgent.set()
        return claim.token not in await future

    async def write_forever(self) -> None:
        while True:
            await self._dirty.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), REPORT_DELAY_SECONDS)
            self._dirty.clear()
            self._urgent.clear()
            with self._lock:
                writes, self._writes = list(self._writes.values()), {}
            futures, self._futures = self._futures, []
            lost_tokens = await self._write(writes)
            for future in futures:
                future.set_result(lost_tokens)
            for token in lost_tokens:
                self._on_lease_lost(token)

    async def _write(self, writes: list[GuardedWrite]) -> set[str]:
        for attempt in itertools.count(1):
            try:
                async with self.transaction_lock, self._database.transaction() as session:
                    return await leases.apply_writes(session, writes)
            except SQLAlchemyError as error:
                if not is_transient(error) and len(writes) == 1:
                    writes = [_unstorable_failure(writes[0], error)]
                elif not is_transient(error):  # one of them cannot be stored: write each one separately
                    return set[str]().union(*[await self._write([write]) for write in writes])
                log.warning("%d jobs could not be written; trying again", len(writes), exc_info=error)
            await asyncio.sleep(min(backoff(attempt), MAX_WAIT_SECONDS))
        raise AssertionError("unreachable")


def to_storable(value: Any) -> Any:
    """Return the value as JSON that both databases accept: without NaN, and without characters that they refuse."""
    return _replace_unstorable(to_jsonable_python(value, inf_nan_mode="null"))


def checkpoint_event(state: Any) -> JournalEvent:
    """Return the journal event of a checkpoint. The state itself is only in the row of the job: it may be large."""
    return "checkpoint", {"checkpoint": True, "bytes": len(orjson.dumps(state))}


def outcome_event(values: Mapping[str, Any]) -> JournalEvent:
    """Return the journal event of an outcome: its state, its error, and when the next attempt may run."""
    data: dict[str, Any] = {"error": values["error"]} if values.get("error") else {}
    if values["state"] not in FINISHED and "attempt" in values:
        data |= {"attempt": values["attempt"], "run_after": values["run_after"].isoformat()}
    return str(values["state"]), data


def _unstorable_failure(write: GuardedWrite, error: SQLAlchemyError) -> GuardedWrite:
    """Return a write that fails a job whose values no database accepts."""
    log.error("the state of %s cannot be stored", write.job_id, exc_info=error)
    failure = Failure("unstorable", f"What the job reports cannot be stored ({type(error).__name__}).")
    values = leases.failure_values(failure, attempt=1, max_attempts=1)
    return GuardedWrite(write.job_id, write.token, values, [JournalEntry(write.job_id, *outcome_event(values))])


def _is_progress_only(entry: JournalEntry) -> bool:
    """Whether it is a report without metrics, which the next report replaces."""
    return entry.type == "progress" and "metrics" not in entry.data


def _replace_unstorable(value: Any) -> Any:
    """Replace what cannot be stored: PostgreSQL refuses NUL, and file names may contain lone surrogates."""
    if isinstance(value, str):
        return UNSTORABLE_CHARACTERS.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_replace_unstorable(key): _replace_unstorable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_replace_unstorable(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
