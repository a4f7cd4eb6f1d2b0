"""The journal: records events of jobs in the transaction that causes them, and publishes them after the commit."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from sqlalchemy import insert, select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import events
from cluster.db import advisory_lock, after_commit, before_commit, now
from jobs.tables import JobEvent


@dataclass(frozen=True)
class JournalEntry:
    job_id: str
    type: str
    data: dict[str, Any] = field(default_factory=dict[str, Any])
    created_at: datetime = field(default_factory=now)


def record(session: AsyncSession, entries: Iterable[JournalEntry]) -> None:
    """Write entries at the end of this transaction. After the commit, the rooms `jobs` and `job:ID` receive them."""
    if "journal" not in session.info:
        session.info["journal"] = []
        before_commit(session, lambda: _write(session))
    session.info["journal"] += entries


async def read(
    session: AsyncSession, job_id: str, after: int = 0, limit: int = 500, event_type: str | None = None
) -> list[JobEvent]:
    """Return the next entries of a job, after the one with the id `after`."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.id > after)
    if event_type:
        query = query.where(JobEvent.type == event_type)
    return list(await session.scalars(query.order_by(JobEvent.id).limit(limit)))


async def newest(session: AsyncSession, job_id: str, event_type: str, limit: int) -> list[JobEvent]:
    """Return the last entries of one type, newest first."""
    query = select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.type == event_type)
    return list(await session.scalars(query.order_by(JobEvent.id.desc()).limit(limit)))


async def newest_metric(session: AsyncSession, job_id: str, name: str) -> float | None:
    """Return the last value that a job has reported for a metric. None: there is none."""
    metric = JobEvent.data["metrics"][name].as_float()
    query = select(metric).where(JobEvent.job_id == job_id, JobEvent.type == "progress", metric.is_not(None))
    return await session.scalar(query.order_by(JobEvent.id.desc()).limit(1))


async def _write(session: AsyncSession) -> None:
    entries: list[JournalEntry] = session.info.pop("journal")
    if not entries:
        return
    await session.flush()
    # Readers continue after the last id that they saw, so ids must become visible in order.
    await advisory_lock(session, "journal")
    rows = [
        {"job_id": entry.job_id, "type": entry.type, "data": entry.data, "created_at": entry.created_at}
        for entry in entries
    ]
    await session.execute(insert(JobEvent), rows)
    after_commit(session, lambda: events.publish(_messages(entries)))


def _messages(entries: Iterable[JournalEntry]) -> list[events.Message]:
    return [
        events.build_message(
            ["jobs", f"job:{entry.job_id}"],
            f"job.{entry.type}",
            {"job_id": entry.job_id, **entry.data},
            entry.created_at,
        )
        for entry in entries
    ]
