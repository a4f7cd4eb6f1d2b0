"""The whole life of an installation, with the real command line and real processes."""

import json
import signal
import subprocess
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support.platform import BINARIES, Platform, running_platform, unused_ports
from tests.support.waiting import TIMEOUT, eventually

pytestmark = pytest.mark.platform

COMPONENTS = ["ray", "gateway", "dispatcher", "events", "mlflow", "database"]


@pytest.fixture(scope="module")
def installation() -> Generator[Platform]:
    with running_platform() as platform:
        yield platform


@pytest.fixture
def platform(installation: Platform) -> Platform:
    """The installation, up: a test before may have left it down."""
    if installation.cli("up", "--detach", check=False).returncode:
        await_gateway(installation)
    return installation


def supervisor(platform: Platform) -> psutil.Process:
    return psutil.Process(json.loads((platform.home / "run" / "state.json").read_text())["pid"])


def states(platform: Platform) -> dict[str, str]:
    done = platform.cli("status", "--json", check=False)
    return {one["component"]: one["state"] for one in json.loads(done.stdout)}


def await_gateway(platform: Platform) -> None:
    """It is degraded for a moment whenever one of its parts takes longer than a second."""
    eventually(lambda: states(platform)["gateway"] == "running")


def listening(platform: Platform) -> set[tuple[str, int]]:
    """(address, port) of everything that the installation's processes listen on."""
    found: set[tuple[str, int]] = set()
    for process in platform.processes():
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    address, port = connection.laddr
                    found.add((address.removeprefix("::ffff:"), port))
    return found


def port_of(url: str) -> int:
    port = httpx.URL(url).port
    assert port is not None
    return port


def test_status_shows_each_component_and_where_it_is(platform: Platform) -> None:
    everything_runs = dict.fromkeys(COMPONENTS, "running")
    assert eventually(lambda: found if (found := states(platform)) == everything_runs else None)
    done = eventually(lambda: platform.cli("status"))
    assert platform.url in done.stdout
    assert platform.mlflow_url in done.stdout
    told = json.loads(eventually(lambda: platform.cli("status", "--json")).stdout)
    assert all(one["uptime"] > 0 for one in told if one["component"] != "database")
    assert all(one["address"] for one in told)


def test_every_port_is_on_loopback(platform: Platform) -> None:
    addresses = listening(platform)
    assert {port_of(platform.url), port_of(platform.dashboard_url)} <= {port for _, port in addresses}
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


@pytest.mark.deep
def test_mlflow_is_started_again(platform: Platform) -> None:
    platform.wait_for_mlflow()
    [old] = platform.processes(mentions="mlflow")
    old.kill()
    eventually(lambda: not old.is_running())
    platform.wait_for_mlflow()
    await_gateway(platform)


@pytest.mark.deep
def test_a_supervisor_that_is_killed_takes_everything_along_and_up_recovers(platform: Platform) -> None:
    supervisor(platform).kill()
    platform.up()
    await_gateway(platform)


@pytest.mark.deep
def test_when_ray_dies_everything_stops_and_up_goes_on(platform: Platform) -> None:
    job_id = platform.submit(spec={"payload": "kept"})
    platform.wait_for(job_id, "succeeded")
    watched = supervisor(platform)
    [server] = [process for process in platform.processes(mentions="gcs_server") if process.name() == "gcs_server"]
    server.kill()
    watched.wait(TIMEOUT)
    assert "Ray has died" in (platform.home / "logs" / "up.log").read_text()
    assert platform.processes() == []
    assert set(states(platform).values()) == {"stopped"}
    platform.up()
    assert platform.job(job_id)["result"]["payload"] == "kept"


def test_down_leaves_nothing(platform: Platform) -> None:
    ports = {port for _, port in listening(platform) if port < 32_768}  # others are anybody's, once they are free
    watched = supervisor(platform)
    assert "Forgearr is stopped" in platform.cli("down").stdout
    assert not watched.is_running()
    assert platform.processes() == []
    listeners = {one.laddr for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert not ports & {address[1] for address in listeners if address}
    assert platform.cli("down").stdout == "Forgearr is not running.\n"


@pytest.mark.deep
def test_an_open_bind_needs_an_admin_and_opens_one_port(installation: Platform) -> None:
    platform = installation
    platform.down()
    command = ["up", "--detach", "--set", "serve.host=0.0.0.0", "--set", "mlflow.enabled=false"]
    refused = platform.cli(*command, check=False)
    assert refused.returncode == 1
    assert "`forgearr user add EMAIL --admin`" in refused.stderr
    assert platform.processes() == []

    add_admin(platform)
    platform.cli(*command)
    assert {address for address in listening(platform) if address[0] not in ("127.0.0.1", "::1")} == {
        ("0.0.0.0", port_of(platform.url))
    }
    assert platform.http.get("/api/v1/jobs").status_code == 401
    watched = supervisor(platform)
    watched.send_signal(signal.SIGINT)
    watched.wait(TIMEOUT)
    assert platform.processes() == []


def add_admin(platform: Platform) -> None:
    command = [str(BINARIES / "forgearr"), "user", "add", "ada@example.com", "--admin", "--password-stdin"]
    subprocess.run(
        command, input="correct horse battery\n", env=platform.environment, text=True, check=True, timeout=TIMEOUT
    )


@pytest.mark.deep
def test_a_cluster_that_is_not_there_is_said_at_once(tmp_path: Path) -> None:
    (port,) = unused_ports(1)
    platform = Platform(tmp_path / "home", {"ray.address": f"127.0.0.1:{port}"})
    refused = platform.cli("up", "--detach", check=False)
    assert refused.returncode == 1
    assert f"No Ray cluster answers at 127.0.0.1:{port}." in refused.stdout + refused.stderr
