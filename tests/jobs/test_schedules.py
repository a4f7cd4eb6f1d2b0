"""Schedules: their times, their ticks, and what happens when one can no longer fire."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import func, select, update

from cluster import identity
from cluster.db import Database, now
from cluster.errors import Forbidden
from cluster.ownership import Principal
from jobs import schedules
from jobs.registry import InvalidSpec
from jobs.schedules import ScheduleNameTaken, ScheduleNotFound, ScheduleRequest
from jobs.states import State
from jobs.tables import Job, Schedule, ScheduleTick

pytestmark = pytest.mark.both_databases

ALICE = Principal(id="a" * 36, name="alice")


@pytest.fixture(autouse=True)
async def _account_of_alice(database: Database) -> None:  # pyright: ignore[reportUnusedFunction]
    async with database.transaction() as session:
        session.add(identity.User(id=ALICE.id, email="alice@example.com", username="alice", password_hash="-"))


def build_request(**changes: Any) -> ScheduleRequest:
    return ScheduleRequest.model_validate({"name": "nightly", "kind": "probe", "cron": "0 3 * * *", **changes})


async def create(database: Database, request: ScheduleRequest, principal: Principal = ALICE) -> Schedule:
    async with database.transaction() as session:
        return await schedules.create(session, request, principal)


async def make_due(database: Database, since: timedelta = timedelta(minutes=1)) -> None:
    async with database.transaction() as session:
        await session.execute(update(Schedule).values(next_fire_at=now() - since))


async def reread(database: Database, schedule: Schedule) -> Schedule:
    async with database.read_transaction() as session:
        return await session.get_one(Schedule, schedule.id)


async def fire(database: Database) -> None:
    async with database.transaction() as session:
        await schedules.fire_due(session)


@pytest.mark.parametrize(
    ("cron", "zone", "after", "next_time"),
    [
        ("0 3 * * *", "UTC", "2026-01-01T03:00:00+00:00", "2026-01-02T03:00:00+00:00"),
        ("0 3 * * *", "Europe/Berlin", "2026-01-01T00:00:00+00:00", "2026-01-01T02:00:00+00:00"),
        ("0 3 * * *", "Europe/Berlin", "2026-07-01T00:00:00+00:00", "2026-07-01T01:00:00+00:00"),
        # The clock jumps from 2:00 to 3:00 that night. A time within the gap fires right after it.
        ("30 2 * * *", "Europe/Berlin", "2026-03-29T00:00:00+00:00", "2026-03-29T01:00:00+00:00"),
    ],
)
def test_fire_times_follow_the_time_zone(cron: str, zone: str, after: str, next_time: str) -> None:
    assert schedules.next_fire(cron, zone, datetime.fromisoformat(after)) == datetime.fromisoformat(next_time)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("cron", "every day"),
        ("cron", "0 0 31 2 *"),
        ("cron", "* * * * * *x"),
        ("timezone", "Mars/Olympus"),
        ("timezone", "../etc/passwd"),
    ],
)
def test_an_invalid_cron_or_time_zone_is_refused(field: str, value: str) -> None:
    with pytest.raises(ValidationError, match=field):
        build_request(**{field: value})


async def test_a_due_schedule_queues_one_job_and_sets_its_next_time(database: Database) -> None:
    schedule = await create(database, build_request(spec={"payload": 1}, priority=-4))
    await make_due(database)
    await asyncio.gather(fire(database), fire(database))
    async with database.read_transaction() as session:
        job = (await session.scalars(select(Job))).one()
        updated = await session.get_one(Schedule, schedule.id)
        ticks = await session.scalar(select(func.count()).select_from(ScheduleTick))
    assert (job.spec["payload"], job.priority, job.owner_id, job.created_by) == (1, -4, ALICE.id, "schedule:nightly")
    assert (updated.last_job_id, ticks) == (job.id, 1)
    assert updated.next_fire_at is not None
    assert updated.next_fire_at > now()


async def test_several_missed_times_queue_one_job(database: Database) -> None:
    await create(database, build_request(cron="0 0 1 1 *"))
    await make_due(database, since=timedelta(days=1100))
    await fire(database)
    await fire(database)
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Job)) == 1


async def test_one_tick_queues_at_most_one_job(database: Database) -> None:
    await create(database, build_request())
    moment = datetime(2026, 1, 1, 3, tzinfo=UTC)
    for _ in range(2):
        async with database.transaction() as session:
            await session.execute(update(Schedule).values(next_fire_at=moment))
        await fire(database)
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Job)) == 1


async def test_a_schedule_of_an_unknown_kind_records_a_failed_job_and_is_disabled(database: Database) -> None:
    schedule = await create(database, build_request())
    async with database.transaction() as session:
        await session.execute(update(Schedule).values(kind="gone", next_fire_at=now() - timedelta(minutes=1)))
    await fire(database)
    async with database.read_transaction() as session:
        job = (await session.scalars(select(Job))).one()
        updated = await session.get_one(Schedule, schedule.id)
    assert (job.state, job.error["code"]) == (State.FAILED, "job_kind_not_found")  # pyright: ignore[reportOptionalSubscript]
    assert not updated.enabled


async def test_a_schedule_whose_time_zone_is_unknown_here_is_disabled_and_the_others_fire(database: Database) -> None:
    """The gateway's machine may know a zone that the dispatcher's does not."""
    schedule = await create(database, build_request())
    other = await create(database, build_request(name="other"))
    async with database.transaction() as session:
        await session.execute(update(Schedule).where(Schedule.id == schedule.id).values(timezone="Mars/Olympus"))
    await make_due(database)
    await fire(database)
    async with database.read_transaction() as session:
        jobs = {job.created_by: job for job in await session.scalars(select(Job))}
        updated = await session.get_one(Schedule, schedule.id)
    failed, queued = jobs["schedule:nightly"], jobs["schedule:other"]
    assert (failed.state, failed.error["code"]) == (State.FAILED, "unknown_time_zone")  # pyright: ignore[reportOptionalSubscript]
    assert "'Mars/Olympus'" in failed.error["message"]  # pyright: ignore[reportOptionalSubscript]
    assert (updated.enabled, updated.next_fire_at, updated.last_job_id) == (False, None, failed.id)
    assert (queued.state, queued.id) == (State.QUEUED, (await reread(database, other)).last_job_id)


async def test_the_schedule_of_a_disabled_account_is_disabled(database: Database) -> None:
    async with database.transaction() as session:
        user = identity.User(email="bob@example.com", username="bob", password_hash="-", is_active=False)
        session.add(user)
        await session.flush()
        schedule = await schedules.create(session, build_request(), Principal(id=user.id, name="bob"))
    await make_due(database)
    await fire(database)
    async with database.read_transaction() as session:
        job = (await session.scalars(select(Job))).one()
        updated = await session.get_one(Schedule, schedule.id)
    assert (job.state, job.error["code"]) == (State.FAILED, "account_disabled")  # pyright: ignore[reportOptionalSubscript]
    assert not updated.enabled


async def test_a_platform_schedule_takes_its_name_from_a_users_schedule(database: Database) -> None:
    users_schedule = await create(database, build_request(name="sweep"))
    for _ in range(2):
        async with database.transaction() as session:
            await schedules.ensure(session, build_request(name="sweep", kind="sweep", spec={}))
    async with database.read_transaction() as session:
        stored = {row.name: (row.kind, row.enabled) for row in await session.scalars(select(Schedule))}
    assert stored == {"sweep": ("sweep", True), f"sweep-{users_schedule.id}": ("probe", True)}


async def test_a_disabled_schedule_does_not_fire(database: Database) -> None:
    schedule = await create(database, build_request(enabled=False))
    assert schedule.next_fire_at is None
    await make_due(database)
    await fire(database)
    async with database.read_transaction() as session:
        assert await session.scalar(select(func.count()).select_from(Job)) == 0


async def test_names_are_unique_and_specs_are_checked(database: Database) -> None:
    await create(database, build_request())
    with pytest.raises(ScheduleNameTaken):
        await create(database, build_request())
    with pytest.raises(InvalidSpec):
        await create(database, build_request(name="other", spec={"steps": "many"}))
    with pytest.raises(Forbidden):
        await create(database, build_request(name="other", kind="sweep"))
    async with database.read_transaction() as session:
        assert [row.name for row in await session.scalars(select(Schedule))] == ["nightly"]


async def test_a_schedule_is_visible_only_to_its_owner(database: Database) -> None:
    schedule = await create(database, build_request())
    async with database.read_transaction() as session:
        assert (await schedules.get(session, schedule.id, ALICE)).name == "nightly"
        with pytest.raises(ScheduleNotFound):
            await schedules.get(session, schedule.id, Principal(id="b" * 36, name="bob"))
