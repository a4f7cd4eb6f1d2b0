"""The whole platform over PostgreSQL."""

from collections.abc import Generator

import pytest

from tests.conftest import new_postgres_database
from tests.platform import Platform, eventually, running_platform

pytestmark = pytest.mark.platform


@pytest.fixture
async def database_url(postgres_server: str) -> str:
    return await new_postgres_database(postgres_server)


@pytest.fixture
def platform(database_url: str) -> Generator[Platform]:
    with running_platform({"database.url": database_url, "mlflow.enabled": "false"}) as platform:
        yield platform


def test_jobs_run_and_survive_on_postgresql(platform: Platform) -> None:
    jobs = [platform.submit(spec={"steps": 4, "seconds": 2}) for _ in range(60)]
    eventually(lambda: platform.count("running") >= 10 or None)
    platform.kill("ray::Worker")
    platform.kill("ray::Dispatcher")
    eventually(lambda: platform.count("succeeded") == 60 or None, seconds=90)
    assert all(platform.job(job_id)["result"]["executed"] == [0, 1, 2, 3] for job_id in jobs)
    assert "postgresql" in platform.cli("status").stdout
