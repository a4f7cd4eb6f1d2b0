"""Writes what a worker's jobs say to the database: together, one transaction at a time.

What comes in while one transaction is under way goes into the next, so that a hundred jobs that report at once cost no
more than a few. A database that is away costs time, not work.
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

from pydantic_core import to_jsonable_python
from sqlalchemy.exc import SQLAlchemyError

from cluster.db import Database, is_passing
from jobs import leases
from jobs.journal import Entry
from jobs.leases import Claim, Write
from jobs.retry_policy import Failure, backoff
from jobs.states import FINISHED

REPORT_SECONDS = 0.5
"""How long a report or a log line may wait for others to be written with it."""
LONGEST_WAIT_SECONDS = 10.0

UNSTORABLE = re.compile("[\\x00\\ud800-\\udfff]")

log = logging.getLogger(__name__)

News = tuple[str, dict[str, Any]]
"""Type and data of an entry for the journal."""


class Writer:
    def __init__(self, database: Database, on_refusal: Callable[[str], None]) -> None:
        """`on_refusal` hears the token of each lease under which nothing is written any more."""
        self._database = database
        self._on_refusal = on_refusal
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._writes: dict[str, Write] = {}  # by token
        self._waiting: list[asyncio.Future[set[str]]] = []
        self._dirty, self._urgent = asyncio.Event(), asyncio.Event()
        self.one_at_a_time = asyncio.Lock()
        """Held by every transaction on this worker's jobs, so that no two of them lock the same rows crosswise."""

    def gather(self, claim: Claim, values: Mapping[str, Any], news: News | None = None) -> None:
        """Have this written with the next transaction. From any thread."""
        with self._lock:
            if not self._writes:
                self._loop.call_soon_threadsafe(self._dirty.set)
            write = self._writes.setdefault(claim.token, Write(claim.job_id, claim.token))
            write.values.update(values)
            if news is None:
                return
            entry = Entry(claim.job_id, *news)
            if _is_mere_progress(entry) and write.entries and _is_mere_progress(write.entries[-1]):
                entry = Entry(claim.job_id, entry.type, {**write.entries.pop().data, **entry.data})
            write.entries.append(entry)

    async def write(self, claim: Claim, values: Mapping[str, Any], news: News | None = None) -> bool:
        """Have this written now, and wait for it; returns whether the lease still holds."""
        self.gather(claim, values, news)
        written: asyncio.Future[set[str]] = self._loop.create_future()
        self._waiting.append(written)
        self._urgent.set()
        return claim.token not in await written

    async def write_forever(self) -> None:
        while True:
            await self._dirty.wait()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._urgent.wait(), REPORT_SECONDS)
            self._dirty.clear()
            self._urgent.clear()
            with self._lock:
                writes, self._writes = list(self._writes.values()), {}
            waiting, self._waiting = self._waiting, []
            refused = await self._write(writes)
            for written in waiting:
                written.set_result(refused)
            for token in refused:
                self._on_refusal(token)

    async def _write(self, writes: list[Write]) -> set[str]:
        for attempt in itertools.count(1):
            try:
                async with self.one_at_a_time, self._database.transaction() as session:
                    return await leases.write(session, writes)
            except SQLAlchemyError as error:
                if not is_passing(error) and len(writes) == 1:
                    writes = [_unstorable(writes[0], error)]
                elif not is_passing(error):  # one of them cannot be stored: do not let it take the others along
                    return set[str]().union(*[await self._write([one]) for one in writes])
                log.warning("%d jobs could not be written; trying again", len(writes), exc_info=error)
            await asyncio.sleep(min(backoff(attempt), LONGEST_WAIT_SECONDS))
        raise AssertionError("unreachable")


def storable(value: Any) -> Any:
    """The value as plain JSON that both databases take: NaN is null, and what is in no text of theirs is replaced."""
    return _as_text(to_jsonable_python(value, inf_nan_mode="null"))


def outcome_news(values: Mapping[str, Any]) -> News:
    """How the journal tells of an outcome: its state, its error, and when it goes on if it does."""
    data: dict[str, Any] = {"error": values["error"]} if values.get("error") else {}
    if values["state"] not in FINISHED and "attempt" in values:
        data |= {"attempt": values["attempt"], "run_after": values["run_after"].isoformat()}
    return str(values["state"]), data


def _unstorable(refused: Write, error: SQLAlchemyError) -> Write:
    """What becomes of a job that says something which no database takes."""
    log.error("the state of %s cannot be stored", refused.job_id, exc_info=error)
    failure = Failure("unstorable", f"What the job reports cannot be stored ({type(error).__name__}).")
    values = leases.failed(failure, attempt=1, max_attempts=1)
    return Write(refused.job_id, refused.token, values, [Entry(refused.job_id, *outcome_news(values))])


def _is_mere_progress(entry: Entry) -> bool:
    """A report without numbers is worth keeping only until the next one."""
    return entry.type == "progress" and "metrics" not in entry.data


def _as_text(value: Any) -> Any:
    """PostgreSQL refuses NUL, and the names of files may have halves of characters."""
    if isinstance(value, str):
        return UNSTORABLE.sub("\ufffd", value)
    if isinstance(value, dict):
        return {_as_text(key): _as_text(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_as_text(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
