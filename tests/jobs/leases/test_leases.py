"""Leases and the leadership: no two clocks need to agree, and no lease has two holders. On both databases."""

import asyncio
import itertools
from datetime import datetime, timedelta, tzinfo

import pytest
from sqlalchemy import text

from cluster import db
from cluster.db import Database
from cluster.settings import get_settings
from jobs import leases
from jobs.dispatch import holder
from jobs.leases import LeadershipLost, LeaseWatch
from jobs.states import State
from tests.jobs.queue_harness import Clock, QueueHarness
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.both_databases

MINUTES = timedelta(minutes=1)


class WallClock(datetime):
    """The time of a machine whose clock is wrong."""

    offset = timedelta(0)

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:
        return datetime.now(tz) + cls.offset


@pytest.fixture
async def harness(database: Database) -> QueueHarness:
    harness = QueueHarness(database)
    await harness.lead()
    return harness


@pytest.fixture
def wall_clock(monkeypatch: pytest.MonkeyPatch) -> type[WallClock]:
    monkeypatch.setattr(db, "datetime", WallClock)
    monkeypatch.setattr(WallClock, "offset", timedelta(0))
    return WallClock


@pytest.mark.parametrize(
    ("of_dispatcher", "of_worker"),
    [
        ([0], [-5]),
        ([0], [5]),
        ([5], [0]),
        ([-5], [5]),
        ([0, 5, -5], [0]),  # a clock that jumps
        ([0], [5, -5]),
    ],
)
async def test_a_job_does_not_fail_because_clocks_disagree(
    harness: QueueHarness, wall_clock: type[WallClock], of_dispatcher: list[int], of_worker: list[int]
) -> None:
    job = await harness.submit()
    wall_clock.offset = of_dispatcher[0] * MINUTES
    (claim,) = await harness.claim()
    offsets = zip(itertools.cycle(of_dispatcher), itertools.cycle(of_worker), range(20), strict=False)
    for dispatchers, workers, _ in offsets:
        wall_clock.offset = workers * MINUTES
        async with harness.database.transaction() as session:
            assert await leases.renew(session, [claim.token]) == {claim.token: None}
        wall_clock.offset = dispatchers * MINUTES
        harness.clock.seconds += get_settings().jobs.lease_seconds / 3
        assert await harness.release_expired() == []
    assert await harness.write(claim, leases.succeeded_values("done"), ("succeeded", {}))
    assert (await harness.job(job.id)).state == State.SUCCEEDED


@pytest.mark.parametrize("offset", [-5, 5])
async def test_a_leader_is_not_replaced_because_clocks_disagree(
    harness: QueueHarness, wall_clock: type[WallClock], offset: int
) -> None:
    clock = Clock()
    standby = LeaseWatch(clock)
    leading = harness.token
    for _ in range(20):
        wall_clock.offset = timedelta(0)
        async with harness.database.transaction() as session:
            await leases.renew_leadership(session, leading)
        wall_clock.offset = offset * MINUTES
        clock.seconds += get_settings().jobs.lease_seconds / 3
        assert await harness.lead("elsewhere", standby) is None


async def test_a_leader_without_heartbeats_is_replaced(harness: QueueHarness) -> None:
    await harness.submit()
    old, clock = harness.token, Clock()
    standby = LeaseWatch(clock)
    assert await harness.lead("elsewhere", standby) is None
    clock.seconds = get_settings().jobs.lease_seconds
    assert await harness.lead("elsewhere", standby) is None
    clock.seconds += 1
    assert await harness.lead("elsewhere", standby) is not None
    async with harness.database.transaction() as session:
        with pytest.raises(LeadershipLost):
            await leases.claim_jobs(session, old, harness.capacity)
    assert len(await harness.claim()) == 1


async def test_dispatchers_with_the_same_host_and_folder_do_not_replace_each_other(harness: QueueHarness) -> None:
    """Both are often the same in containers."""
    first, second = holder.new_holder(), holder.new_holder()
    async with harness.database.transaction() as session:
        assert await leases.take_leadership(session, first, LeaseWatch(), predecessor="here")
    async with harness.database.transaction() as session:
        assert await leases.take_leadership(session, second, LeaseWatch(), predecessor="here") is None


async def test_a_new_dispatcher_replaces_the_dead_one_of_its_installation_at_once(database: Database) -> None:
    assert holder.find_predecessor() is None
    first, second = holder.new_holder(), holder.new_holder()
    async with database.transaction() as session:
        assert await leases.take_leadership(session, first, LeaseWatch(), holder.find_predecessor())
    holder.remember(first)
    async with database.transaction() as session:
        assert await leases.take_leadership(session, second, LeaseWatch(), holder.find_predecessor())


# SQLite has one write transaction at a time.
@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_nobody_takes_over_during_a_claim(harness: QueueHarness) -> None:
    """Else a dispatcher that was frozen during its claim would commit it beside the new leader."""
    job = await harness.submit()
    old = harness.token
    async with harness.database.transaction() as session:
        (claim,) = await leases.claim_jobs(session, old, harness.capacity)
        takeover = asyncio.create_task(harness.lead("here"))  # need not wait for an expiry
        await _wait_until_blocked(harness.database, takeover)
    assert claim.job_id == job.id
    assert await takeover is not None
    async with harness.database.transaction() as session:
        with pytest.raises(LeadershipLost):
            await leases.claim_jobs(session, old, harness.capacity)


@pytest.mark.parametrize("database", ["postgres"], indirect=True)
async def test_a_lease_that_is_renewed_at_the_last_moment_is_not_released(harness: QueueHarness) -> None:
    job = await harness.submit()
    (claim,) = await harness.claim()
    assert await harness.release_expired() == []
    harness.clock.seconds = get_settings().jobs.lease_seconds
    assert await harness.release_expired() == []
    harness.clock.seconds += 1
    async with harness.database.transaction() as session:
        await leases.renew(session, [claim.token])
        release = asyncio.create_task(harness.release_expired())
        await _wait_until_blocked(harness.database, release)
    assert await release == []
    assert (await harness.job(job.id)).state == State.RUNNING


async def _wait_until_blocked(database: Database, task: "asyncio.Task[object]") -> None:
    """Wait until the task waits for a lock. Fails if it has ended instead."""
    waiting = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"

    async def count() -> int:
        async with database.read_transaction() as session:
            return await session.scalar(text(waiting)) or 0

    loop = asyncio.get_running_loop()
    await eventually_async(lambda: task.done() or asyncio.run_coroutine_threadsafe(count(), loop).result())
    assert not task.done(), "it did not wait"
