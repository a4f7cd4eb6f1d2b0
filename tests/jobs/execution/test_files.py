"""Files that jobs keep in storage: each lease has names of its own, and what no row records is deleted."""

from io import BytesIO

import pytest

from cluster import storage
from cluster.db import Database, now
from jobs import journal
from jobs.execution import files
from jobs.journal import JournalEntry
from jobs.leases import Claim
from jobs.states import State
from jobs.tables import Job

pytestmark = pytest.mark.both_databases


@pytest.mark.usefixtures("any_storage")
async def test_files_that_no_row_records_are_deleted(database: Database) -> None:
    kept = {
        "current/checkpoints/3/weights",  # will be recorded
        "ended/checkpoints/2/weights",
        "ended/checkpoints/2/deep/state",
        "ended/model/weights",
        "ended/report.md",
        "checkpoints/1-1/weights",  # as earlier versions named them
    }
    deleted = {"ended/checkpoints/2-1/weights", "ended/report.md.12ab.part", "lost/checkpoints/2/weights", "report.md"}
    for name in kept | deleted:
        storage.write(BytesIO(b"content"), f"jobs/job_x/{name}")
    other = storage.write(BytesIO(b"content"), "jobs/job_x2/ended/weights")

    def address(name: str) -> str:
        # Storage may have been moved since.
        return f"/elsewhere/jobs/job_x/{name}"

    checkpoint = {"checkpoints": {"2": address("ended/checkpoints/2"), "1": address("checkpoints/1-1")}, "step": 2}
    job = Job(id="job_x", kind="fine_tune", spec={}, state=State.RUNNING, lease_token="current", max_attempts=3)
    job.created_by, job.run_after, job.resources, job.demand = "test", now(), {}, ""
    job.checkpoint, job.result = checkpoint, [{"model": address("ended/model")}]
    async with database.transaction() as session:
        session.add(job)
        await session.flush()
        artifact = {"name": "report.md", "address": address("ended/report.md"), "bytes": 7}
        log = {"level": "INFO", "message": address("lost/checkpoints/2")}
        journal.record(session, [JournalEntry("job_x", "artifact", artifact), JournalEntry("job_x", "log", log)])
    await files.remove_unrecorded(database, "job_x")
    prefix = storage.address("jobs/job_x/")
    assert {found.removeprefix(prefix) for found in storage.find("jobs/job_x")} == kept
    assert storage.exists(other)


async def test_a_job_without_files_needs_nothing(database: Database) -> None:
    await files.remove_unrecorded(database, "job_without_files")


def test_each_lease_has_names_of_its_own() -> None:
    claims = [Claim("job_x", token, "probe", {}, None, 1, 3, None, None, {}, "w", None) for token in ("a", "b")]
    assert [claim.storage_name("report.md") for claim in claims] == ["jobs/job_x/a/report.md", "jobs/job_x/b/report.md"]
