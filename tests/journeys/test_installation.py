"""Status, processes and open ports of a running installation."""

import json

import httpx
import pytest

from tests.support.platform import Platform
from tests.support.waiting import eventually

pytestmark = pytest.mark.platform

COMPONENTS = ["ray", "gateway", "dispatcher", "events", "mlflow", "database"]


def test_status_shows_each_component_with_its_address(platform: Platform) -> None:
    all_running = dict.fromkeys(COMPONENTS, "running")
    assert eventually(lambda: states if (states := platform.component_states()) == all_running else None)
    text = eventually(lambda: platform.cli("status"))
    assert platform.url in text.stdout
    assert platform.mlflow_url in text.stdout
    components = json.loads(eventually(lambda: platform.cli("status", "--json")).stdout)
    assert all(component["uptime"] > 0 for component in components if component["component"] != "database")
    assert all(component["address"] for component in components)


def test_every_port_is_on_loopback(platform: Platform) -> None:
    addresses = platform.listening()
    assert {httpx.URL(platform.url).port, httpx.URL(platform.dashboard_url).port} <= {port for _, port in addresses}
    assert {address for address, _ in addresses} <= {"127.0.0.1", "::1"}


def test_unused_processes_do_not_run(platform: Platform) -> None:
    assert not platform.processes(mentions="ray.util.client.server")
    assert not platform.processes(mentions="huey")
    assert len(platform.processes(mentions="mlflow")) == 1


def test_a_second_up_fails_with_a_message(platform: Platform) -> None:
    process = platform.cli("up", "--detach", check=False)
    assert process.returncode == 1
    assert f"already running at {platform.url}" in process.stderr


def test_doctor_and_logs_work_while_it_runs(platform: Platform) -> None:
    assert "in use by the running Forgearr" in platform.cli("doctor").stdout
    assert f"ready at {platform.url}" in platform.cli("logs", "--component", "supervisor").stdout
