"""The database goes away for a minute, while jobs run and requests come."""

import asyncio
import time
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from uuid import uuid4

import httpx
import pytest

from cluster.db import DatabaseUnavailable
from tests.conftest import new_postgres_database
from tests.support.platform import Platform, running_platform
from tests.support.storage.postgres import PostgresServer, running_postgres
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

AWAY_SECONDS = 60
CLIENTS = 4
PAUSE_SECONDS = 0.5
CLIENT_SECONDS = 300
"""How long a client tries again."""
STEPS = 8
COMPONENTS = ("ray::Dispatcher", "ray::Events", "ray::ServeReplica")


@pytest.fixture
def server(postgres_binaries: Path) -> Generator[PostgresServer]:
    with running_postgres(postgres_binaries) as server:
        yield server


@pytest.fixture
def platform(server: PostgresServer) -> Generator[Platform]:
    url = asyncio.run(new_postgres_database(server.url, template="template0"))
    with running_platform({"database.url": url, "mlflow.enabled": "false"}) as platform:
        yield platform


def test_no_job_is_lost_or_doubled_while_the_database_is_away(platform: Platform, server: PostgresServer) -> None:
    before = components(platform)
    with clients(platform) as (jobs, refusals):
        eventually(lambda: platform.count("running") >= CLIENTS)
        server.stop()
        eventually(lambda: len(refusals) >= CLIENTS)
        assert platform.http.get("/api/v1/ping").status_code == 200
        for path in ("/health", "/metrics", "/api/v1/jobs"):
            assert_unavailable(platform.http.get(path))
        time.sleep(AWAY_SECONDS)  # not a wait: the length of the outage is what is tried
        submitted = len(jobs)
        server.start()
        eventually(lambda: len(jobs) > submitted + CLIENTS)
    for refusal in refusals:
        assert_unavailable(refusal)
    assert len(set(jobs)) == len(jobs)
    eventually(lambda: platform.count("succeeded") == len(jobs))
    assert platform.http.get("/api/v1/jobs", params={"kind": "probe", "limit": 1}).json()["total"] == len(jobs)
    for job_id in jobs:
        assert platform.job(job_id)["result"]["executed"] == list(range(STEPS))
        events = platform.http.get(f"/api/v1/jobs/{job_id}/events", params={"limit": 500}).json()["items"]
        assert [event["type"] for event in events].count("succeeded") == 1
    assert components(platform) == before


@contextmanager
def clients(platform: Platform) -> Generator[tuple[list[str], list[httpx.Response]]]:
    """Clients that submit jobs without pause. Yields the ids of the jobs, and what was refused so far."""
    jobs: list[str] = []
    refusals: list[httpx.Response] = []
    stop = Event()

    def submit() -> None:
        while not stop.wait(PAUSE_SECONDS):
            jobs.append(eventually(partial(send, {"Idempotency-Key": uuid4().hex}), CLIENT_SECONDS))

    def send(headers: dict[str, str]) -> str | None:
        body: dict[str, Any] = {"kind": "probe", "spec": {"steps": STEPS, "seconds": 20}}
        response = http.post("/api/v1/jobs", json=body, headers=headers)
        if response.status_code == 201:
            return response.json()["id"]
        refusals.append(response)
        return None

    with httpx.Client(base_url=platform.url, timeout=TIMEOUT) as http, ThreadPoolExecutor(CLIENTS) as threads:
        running: list[Future[None]] = [threads.submit(submit) for _ in range(CLIENTS)]
        try:
            yield jobs, refusals
        finally:
            stop.set()
            for client in running:
                client.result()


def assert_unavailable(response: httpx.Response) -> None:
    expected = (503, str(DatabaseUnavailable.retry_after))
    assert (response.status_code, response.headers.get("retry-after")) == expected, response.text


def components(platform: Platform) -> dict[str, list[int]]:
    """The processes that nothing may restart."""
    found = {title: sorted(process.pid for process in platform.processes(title)) for title in COMPONENTS}
    assert all(found.values()), found
    return {**found, "supervisor": [platform.supervisor.pid]}
