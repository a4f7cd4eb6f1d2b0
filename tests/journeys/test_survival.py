"""No job is lost when any process of the platform is killed."""

import signal
import sqlite3
from collections import Counter
from contextlib import closing
from typing import Any

import pytest

from tests.support.platform import Platform
from tests.support.waiting import eventually

pytestmark = pytest.mark.platform

STEPS = 6


def test_jobs_survive_a_killed_worker_and_a_killed_dispatcher(platform: Platform) -> None:
    jobs: list[str] = []
    for part in ("ray::Worker", "ray::Dispatcher"):
        platform.keep_busy(jobs, {"steps": STEPS, "seconds": 2, "payload": "precious"})
        platform.processes(part)[0].kill()
    _assert_all_succeeded(platform, jobs)


@pytest.mark.deep
def test_300_jobs_survive_a_kill_of_each_process(platform: Platform) -> None:
    spec = {"steps": STEPS, "seconds": 12, "payload": "precious"}
    jobs: list[str] = []
    for part in ("ray::Worker", "ray::Dispatcher", "ray::Events", "ray::ServeReplica", "everything"):
        platform.keep_busy(jobs, spec)
        if part == "everything":
            platform.cut_the_power()
            platform.up()
        elif part == "ray::Worker":
            platform.processes(part)[0].kill()
        else:
            platform.kill(part)
        half = len(jobs) // 2
        eventually(lambda minimum=half: platform.count("succeeded") >= minimum)

    _assert_all_succeeded(platform, jobs)


@pytest.mark.deep
def test_a_frozen_worker_cannot_overwrite_its_successor(platform: Platform) -> None:
    for _ in range(10):
        job_id = platform.submit(spec={"steps": 40, "seconds": 8})
        eventually(lambda job_id=job_id: platform.job(job_id)["progress"] > 5)
        frozen = eventually(lambda: _freeze_workers(platform))
        if platform.job(job_id)["state"] == "running":
            break
        platform.kill("ray::Worker", signal.SIGCONT)
    else:
        pytest.fail("each of ten jobs finished before its worker was frozen")
    holder = platform.events(job_id, "running")[0]["data"]["worker"]
    # Both warm workers are frozen now, so the job must move to a new process.
    eventually(lambda: len(platform.events(job_id, "running")) > 1)
    job = platform.wait_for(job_id, "succeeded")
    for pid in frozen:
        for process in platform.processes("ray::Worker"):
            if process.pid == pid:
                process.send_signal(signal.SIGCONT)
    eventually(lambda: not {process.pid for process in platform.processes("ray::Worker")} & set(frozen))
    after = platform.job(job_id)
    assert after["result"] == job["result"] == {"payload": None, "executed": list(range(40))}
    assert after["finished_at"] == job["finished_at"]
    events = platform.events(job_id)
    _assert_one_result(events)
    assert next(event["data"]["worker"] for event in events if event["type"] == "running") == holder


def _freeze_workers(platform: Platform) -> list[int] | None:
    """Freeze the workers, but not during a transaction: a frozen worker would keep SQLite's lock."""
    frozen = platform.kill("ray::Worker", signal.SIGSTOP)
    with closing(sqlite3.connect(platform.home / "forgearr.db", timeout=1, isolation_level=None)) as database:
        try:
            database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError:
            platform.kill("ray::Worker", signal.SIGCONT)
            return None
    return frozen


def _assert_all_succeeded(platform: Platform, jobs: list[str]) -> None:
    for job_id in jobs:
        assert platform.wait_for(job_id)["result"] == {"payload": "precious", "executed": list(range(STEPS))}
        _assert_one_result(platform.events(job_id))


def _assert_one_result(events: list[dict[str, Any]]) -> None:
    """Check that there is one result, and that no step ran again after its checkpoint."""
    kinds = Counter(event["type"] for event in events)
    assert kinds["succeeded"] == 1
    sizes = [event["data"]["bytes"] for event in events if event["type"] == "checkpoint"]
    assert sizes == sorted(set(sizes)), sizes  # each has one step more
