"""What a running installation tells of itself, and what it opens."""

import json

import httpx
import pytest

from tests.support.platform import Platform
from tests.support.waiting import eventually

pytestmark = pytest.mark.platform

COMPONENTS = ["ray", "gateway", "dispatcher", "events", "mlflow", "database"]


def test_status_shows_each_component_and_where_it_is(platform: Platform) -> None:
    everything_runs = dict.fromkeys(COMPONENTS, "running")
    assert eventually(lambda: found if (found := platform.component_states()) == everything_runs else None)
    done = eventually(lambda: platform.cli("status"))
    assert platform.url in done.stdout
    assert platform.mlflow_url in done.stdout
    told = json.loads(eventually(lambda: platform.cli("status", "--json")).stdout)
    assert all(one["uptime"] > 0 for one in told if one["component"] != "database")
    assert all(one["address"] for one in told)


def test_every_port_is_on_loopback(platform: Platform) -> None:
    addresses = platform.listening()
    assert {httpx.URL(platform.url).port, httpx.URL(platform.dashboard_url).port} <= {port for _, port in addresses}
    assert {address for address, _ in addresses} <= {"127.0.0.1", "::1"}


def test_what_nobody_uses_does_not_run(platform: Platform) -> None:
    assert not platform.processes(mentions="ray.util.client.server")
    assert not platform.processes(mentions="huey")
    assert len(platform.processes(mentions="mlflow")) == 1


def test_up_twice_says_so(platform: Platform) -> None:
    done = platform.cli("up", "--detach", check=False)
    assert done.returncode == 1
    assert f"already running at {platform.url}" in done.stderr


def test_doctor_and_logs_work_while_it_runs(platform: Platform) -> None:
    assert "in use by the running Forgearr" in platform.cli("doctor").stdout
    assert f"ready at {platform.url}" in platform.cli("logs", "--component", "supervisor").stdout
