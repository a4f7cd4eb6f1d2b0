"""The whole platform over PostgreSQL."""

import asyncio
from collections.abc import Generator

import asyncpg
import pytest

from tests.conftest import new_postgres_database
from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]


@pytest.fixture
async def database_url(postgres_server: str) -> str:
    return await new_postgres_database(postgres_server, template="template0")


@pytest.fixture
def platform(database_url: str) -> Generator[Platform]:
    with running_platform({"database.url": database_url, "mlflow.enabled": "false"}) as platform:
        yield platform


def test_jobs_survive_on_postgresql(platform: Platform, database_url: str) -> None:
    jobs: list[str] = []
    spec = {"steps": 4, "seconds": 4}
    platform.keep_busy(jobs, spec)
    platform.kill("ray::Worker")
    platform.kill("ray::Dispatcher")
    eventually(lambda: platform.count("succeeded") >= len(jobs) // 2)
    platform.keep_busy(jobs, spec)
    for _ in range(3):
        eventually(lambda: asyncio.run(_cut_connections(database_url)))
    eventually(lambda: platform.count("succeeded") == len(jobs))
    assert all(platform.job(job_id)["result"]["executed"] == [0, 1, 2, 3] for job_id in jobs)
    assert "postgresql" in eventually(lambda: platform.cli("status")).stdout


async def _cut_connections(url: str) -> int:
    """Drop all other connections, as a restart of the server does, and return their number."""
    connection = await asyncpg.connect(url, timeout=TIMEOUT)
    try:
        dropped = await connection.fetch(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    finally:
        await connection.close()
    return len(dropped)
