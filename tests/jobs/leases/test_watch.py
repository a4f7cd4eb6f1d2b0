"""A lease expires by the clock of the process that watches it, and by nothing else."""

import pytest

from cluster.settings import get_settings
from jobs.leases import LeaseWatch
from tests.jobs.queue_harness import Clock


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watch(home: object, clock: Clock) -> LeaseWatch:
    return LeaseWatch(clock)


@pytest.fixture
def lease_seconds(home: object) -> float:
    return get_settings().jobs.lease_seconds


def test_a_lease_without_heartbeats_expires_and_one_with_them_does_not(
    watch: LeaseWatch, clock: Clock, lease_seconds: float
) -> None:
    for second in range(int(lease_seconds) + 1):
        clock.seconds = second
        assert watch.find_expired({"dead": 4, "alive": second}) == {}
    clock.seconds += 1
    assert watch.find_expired({"dead": 4, "alive": int(clock.seconds)}) == {"dead": 4}


def test_a_lease_is_measured_from_when_it_was_seen_first(watch: LeaseWatch, clock: Clock, lease_seconds: float) -> None:
    watch.find_expired({})
    clock.seconds = lease_seconds
    assert watch.find_expired({"old": 900}) == {}
    clock.seconds = 2 * lease_seconds
    assert watch.find_expired({"old": 900}) == {}
    clock.seconds += 1
    assert watch.find_expired({"old": 900}) == {"old": 900}


def test_after_a_pause_of_the_watcher_every_lease_begins_again(
    watch: LeaseWatch, clock: Clock, lease_seconds: float
) -> None:
    """It may have slept together with the holders, or the database was away for all of them."""
    watch.find_expired({"paused": 1})
    clock.seconds = 10 * lease_seconds
    assert watch.find_expired({"paused": 1}) == {}
    clock.seconds += lease_seconds
    assert watch.find_expired({"paused": 1}) == {}
