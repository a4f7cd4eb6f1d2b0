"""The platform that all journeys share, because a start takes longer than most journeys."""

from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from cluster.settings import load_settings
from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT

EPHEMERAL_PORTS = 32_768
"""The first ephemeral port. The system may give a free port above it to another process at once."""
SERVERS = "{ai_server: {this_machine: true}, storage_server: {this_machine: true, file_systems: [/, /tmp]}}"
SETTINGS = {
    "jobs.lease_seconds": "6",
    "jobs.retry_seconds": "0.1",
    "jobs.slots": "32",
    "jobs.stop_grace_seconds": "1",
    "engines.slots": "2",
    "engines.context": "65536",
    "guardian.watch_cron": "0 0 1 1 *",
    "servers.declared": SERVERS,
}
"""Shorter times than the defaults, so that the journeys end sooner."""


@pytest.fixture(scope="session")
def projects(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder whose repositories the platform may read."""
    return tmp_path_factory.mktemp("projects")


@pytest.fixture(scope="session")
def platform(projects: Path) -> Iterator[Platform]:
    modules = [*load_settings().settings.jobs.modules, "tests.support.job_kinds"]
    settings = {**SETTINGS, "jobs.modules": f"[{', '.join(modules)}]", "guardian.roots": f"[{projects}]"}
    with running_platform(settings) as platform:
        platform.wait_for_mlflow()
        yield platform
        _stop(platform)


@pytest.fixture(scope="session")
def client(platform: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{platform.url}/v1", api_key="not-needed", max_retries=0, timeout=TIMEOUT) as client:
        yield client


def _stop(platform: Platform) -> None:
    """Stop the platform, and check that no process and no open port remains. A second stop changes nothing."""
    ports = {port for _, port in platform.listening() if port < EPHEMERAL_PORTS}
    supervisor = platform.supervisor
    assert "Forgearr is stopped" in platform.cli("down").stdout
    assert not supervisor.is_running()
    assert platform.processes() == []
    listeners = {
        connection.laddr for connection in psutil.net_connections("tcp") if connection.status == psutil.CONN_LISTEN
    }
    assert not ports & {address[1] for address in listeners if address}
    assert platform.cli("down").stdout == "Forgearr is not running.\n"
