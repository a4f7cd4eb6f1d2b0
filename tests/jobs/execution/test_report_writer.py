"""What the reports of a job leave in its row and its journal."""

import asyncio
import contextlib

import pytest

from cluster.db import Database
from cluster.ownership import LOCAL
from jobs import journal, queue
from jobs.execution.report_writer import ReportWriter, checkpoint_event
from jobs.leases import Claim
from jobs.queue import JobRequest
from jobs.states import State
from jobs.tables import Job

pytestmark = pytest.mark.both_databases


async def test_the_journal_has_the_size_of_a_checkpoint_and_the_row_its_state(database: Database) -> None:
    async with database.transaction() as session:
        job = await queue.enqueue(session, JobRequest(kind="probe"), LOCAL)
        job.state, job.lease_token = State.RUNNING, "token"
    claim = Claim(job.id, "token", "probe", {}, None, 1, 3, None, None, {}, "worker-1", None)
    writer = ReportWriter(database, lambda token: None)
    writing = asyncio.create_task(writer.write_forever())
    state = {"done": list(range(50_000))}
    assert await writer.write(claim, {"checkpoint": state}, checkpoint_event(state))
    writing.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await writing
    async with database.read_transaction() as session:
        assert (await session.get_one(Job, job.id)).checkpoint == state
        (event,) = await journal.read(session, job.id, event_type="checkpoint")
    assert event.data == {"checkpoint": True, "bytes": 288_900}
