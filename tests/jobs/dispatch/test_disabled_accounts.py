"""What happens to the jobs and schedules of an account that is disabled."""

import pytest
from sqlalchemy import update

from cluster import identity
from cluster.db import Database
from cluster.ownership import LOCAL, Principal
from jobs import queue, schedules
from jobs.dispatch import disabled_accounts
from jobs.queue import JobRequest
from jobs.schedules import ScheduleRequest
from jobs.states import Control, State
from jobs.tables import Job, Schedule

pytestmark = pytest.mark.both_databases


async def add_principal(database: Database, name: str) -> Principal:
    async with database.transaction() as session:
        user = await identity.add_user(session, email=f"{name}@example.com", username=name, password_hash="-")
    return identity.principal(user)


async def disable(database: Database, name: str) -> None:
    async with database.transaction() as session:
        await identity.set_active(session, await identity.get_user(session, f"{name}@example.com"), False)


async def queue_job(database: Database, principal: Principal, **values: object) -> str:
    async with database.transaction() as session:
        job = await queue.enqueue(session, JobRequest(kind="probe"), principal)
        await session.execute(update(Job).where(Job.id == job.id).values(values))
    return job.id


async def read_job(database: Database, job_id: str) -> Job:
    async with database.read_transaction() as session:
        return await session.get_one(Job, job_id)


async def test_the_jobs_of_a_disabled_account_are_cancelled(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disabled_accounts, "PAGE", 2)
    ada, bob = await add_principal(database, "ada"), await add_principal(database, "bob")
    running = {"state": State.RUNNING, "worker": "worker-1", "lease_token": "t"}
    waiting = [await queue_job(database, ada) for _ in range(3)]
    waiting.append(await queue_job(database, ada, state=State.PAUSED))
    started = await queue_job(database, ada, **running)
    pausing = await queue_job(database, ada, **running, control=Control.PAUSE)
    done = await queue_job(database, ada, state=State.SUCCEEDED)
    others = [await queue_job(database, bob), await queue_job(database, LOCAL)]
    await disabled_accounts.stop_work(database)
    assert (await read_job(database, waiting[0])).state == State.QUEUED
    await disable(database, "ada")
    for _ in range(2):  # the second time, there is nothing to do
        await disabled_accounts.stop_work(database)
    for job_id in waiting:
        job = await read_job(database, job_id)
        assert (job.state, job.error and job.error["code"]) == (State.CANCELLED, "account_disabled")
    for job_id in (started, pausing):
        job = await read_job(database, job_id)
        assert (job.state, job.control) == (State.RUNNING, Control.CANCEL)
    assert (await read_job(database, done)).state == State.SUCCEEDED
    for job_id in others:
        assert (await read_job(database, job_id)).state == State.QUEUED


async def test_jobs_that_wait_for_each_other_are_all_cancelled(database: Database) -> None:
    ada = await add_principal(database, "ada")
    async with database.transaction() as session:
        first = await queue.enqueue(session, JobRequest(kind="probe"), ada)
        second = await queue.enqueue(session, JobRequest(kind="probe", depends_on=[first.id]), ada)
    await disable(database, "ada")
    await disabled_accounts.stop_work(database)
    for job_id in (first.id, second.id):
        assert (await read_job(database, job_id)).state == State.CANCELLED


async def test_the_schedules_of_a_disabled_account_are_disabled(database: Database) -> None:
    rows: dict[str, str] = {}
    for name in ("ada", "bob"):
        principal = await add_principal(database, name)
        request = ScheduleRequest(name=f"nightly of {name}", kind="probe", cron="0 3 * * *")
        async with database.transaction() as session:
            rows[name] = (await schedules.create(session, request, principal)).id
    await disable(database, "ada")
    await disabled_accounts.stop_work(database)
    async with database.read_transaction() as session:
        stopped, other = [await session.get_one(Schedule, rows[name]) for name in ("ada", "bob")]
    assert (stopped.enabled, stopped.next_fire_at) == (False, None)
    assert other.enabled
    assert other.next_fire_at is not None
