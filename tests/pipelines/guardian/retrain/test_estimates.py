"""Estimates of a plan's duration, from how long its steps took before."""

from datetime import UTC, datetime, timedelta

from cluster.db import Database
from cluster.ownership import LOCAL
from jobs import queue
from jobs.queue import JobRequest
from jobs.states import State
from pipelines.guardian.retrain import estimates
from pipelines.guardian.retrain.estimates import DEFAULT_MINUTES, RECENT_JOBS
from pipelines.guardian.retrain.job import STEP_PROGRESS, steps_of

BEGIN = datetime(2026, 11, 21, tzinfo=UTC)


async def test_a_step_is_estimated_by_recent_successful_jobs(database: Database) -> None:
    steps = ["extract_data", "validate_data", "deploy"]
    async with database.read_transaction() as session:
        estimated = await estimates.estimate_steps(session, steps)
    assert [(step.id, step.name, step.estimate) for step in estimated] == [
        ("1", "extract_data", "default"),
        ("2", "validate_data", "default"),
        ("3", "deploy", "default"),
    ]
    assert [step.estimated_minutes for step in estimated] == [DEFAULT_MINUTES[step] for step in steps]

    for minutes in (1, 90, 3):
        await record_job(database, "deploy", minutes, State.SUCCEEDED)
    for minutes in (500, 600):  # failed jobs do not count
        await record_job(database, "deploy", minutes, State.FAILED)
    async with database.read_transaction() as session:
        estimated = await estimates.estimate_steps(session, steps)
    assert [step.estimate for step in estimated] == ["default", "default", "measured"]
    assert estimated[2].estimated_minutes == 3

    for number in range(RECENT_JOBS):  # only the most recent jobs count
        await record_job(database, "deploy", 7, State.SUCCEEDED, after=number + 1)
    async with database.read_transaction() as session:
        assert (await estimates.estimate_steps(session, ["deploy"]))[0].estimated_minutes == 7


def test_every_step_has_a_default() -> None:
    assert DEFAULT_MINUTES.keys() == STEP_PROGRESS.keys()
    assert list(STEP_PROGRESS.values()) == sorted(STEP_PROGRESS.values())
    all_steps = steps_of(repository=True, feedback=False, deploy=True)
    assert all_steps == ["extract_data", "validate_data", "fine_tune", "export", "validate", "compare", "deploy"]
    assert steps_of(repository=False, feedback=True, deploy=False)[:2] == ["gather_feedback", "validate_data"]


async def record_job(database: Database, kind: str, minutes: float, state: State, after: int = 0) -> None:
    """Record a job of this kind that took this many minutes."""
    begin = BEGIN + timedelta(days=after)
    async with database.transaction() as session:
        job = await queue.enqueue(session, JobRequest(kind=kind, spec={"name": "m", "version": 1}), LOCAL)
        job.state, job.started_at, job.finished_at = state, begin, begin + timedelta(minutes=minutes)
