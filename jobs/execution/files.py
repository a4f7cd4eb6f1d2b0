"""The files of a job in storage: each lease writes under names of its own (jobs/ID/TOKEN/…), and then records them.

So a worker that was given up changes nothing of its successor's. What no row names is deleted when it notices, when the
job runs again, and when that ends.
"""

import asyncio
from collections.abc import Collection, Iterator
from typing import Any

from sqlalchemy import select

from cluster import storage
from cluster.db import Database
from jobs.tables import Job, JobEvent


async def remove_unrecorded(database: Database, job_id: str) -> None:
    """Delete the files of ended leases that neither the row of the job nor its journal names."""
    # Listed before the row is read: so each file is of the lease in the row, or of one that has ended before it and
    # can record nothing any more.
    addresses = await asyncio.to_thread(storage.find, f"jobs/{job_id}")
    if not addresses:
        return
    async with database.read_transaction() as session:
        job = await session.get_one(Job, job_id)
        is_artifact = (JobEvent.job_id == job_id, JobEvent.type == "artifact")
        artifacts = list(await session.scalars(select(JobEvent.data).where(*is_artifact)))
    recorded = {_name(text, job_id) for text in _texts([job.checkpoint, job.result, artifacts])}
    unrecorded = [address for address in addresses if not _is_kept(_name(address, job_id), job.lease_token, recorded)]
    await asyncio.to_thread(_remove, unrecorded)


def _is_kept(name: str, token: str | None, recorded: Collection[str]) -> bool:
    """Whether a file is of the current lease, or is recorded, or is in a folder that is recorded."""
    parts = name.split("/")
    return parts[0] == token or any("/".join(parts[:count]) in recorded for count in range(1, len(parts) + 1))


def _name(address: str, job_id: str) -> str:
    """Return the name of a file within its job: addresses of one file differ if storage was moved."""
    return address.partition(f"jobs/{job_id}/")[2]


def _texts(document: Any) -> Iterator[str]:
    """Yield all texts in a JSON document."""
    if isinstance(document, str):
        yield document
    elif isinstance(document, dict | list):
        for value in document.values() if isinstance(document, dict) else document:
            yield from _texts(value)


def _remove(addresses: Collection[str]) -> None:
    for address in addresses:
        storage.remove(address)
