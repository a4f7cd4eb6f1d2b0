"""Start, failure, stop and restart of an installation, with the real command line and real processes."""

import shutil
import signal
import subprocess
import tempfile
from collections.abc import Generator
from pathlib import Path

import httpx
import pytest

from cluster.runtime.processes import is_listening
from tests.support.platform import BINARIES, Platform, running_platform, unused_ports
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

SEALING_KEY = "a-sealing-key-of-more-than-32-characters"


@pytest.fixture(scope="module")
def installation() -> Generator[Platform]:
    with running_platform() as platform:
        yield platform


@pytest.fixture
def platform(installation: Platform) -> Platform:
    """The running installation. An earlier test may have stopped it."""
    if installation.cli("up", "--detach", check=False).returncode:
        installation.wait_for_gateway()
    return installation


def test_a_killed_mlflow_is_restarted(platform: Platform) -> None:
    platform.wait_for_mlflow()
    [old] = platform.processes(mentions="mlflow")
    old.kill()
    eventually(lambda: not old.is_running())
    platform.wait_for_mlflow()
    platform.wait_for_gateway()


def test_a_killed_supervisor_stops_the_platform_and_up_restarts_it(platform: Platform) -> None:
    platform.supervisor.kill()
    platform.up()
    platform.wait_for_gateway()


def test_a_killed_ray_stops_the_platform_and_up_restarts_it(platform: Platform) -> None:
    job_id = platform.submit(spec={"payload": "kept"})
    platform.wait_for(job_id, "succeeded")
    supervisor = platform.supervisor
    [server] = [process for process in platform.processes(mentions="gcs_server") if process.name() == "gcs_server"]
    server.kill()
    supervisor.wait(TIMEOUT)
    assert "Ray has died" in (platform.home / "logs" / "up.log").read_text()
    assert platform.processes() == []
    assert set(platform.component_states().values()) == {"stopped"}
    platform.up()
    assert platform.job(job_id)["result"]["payload"] == "kept"


def test_a_bind_beyond_loopback_requires_an_admin_and_opens_one_port(installation: Platform) -> None:
    platform = installation
    platform.down()
    command = ["up", "--detach", "--set", "serve.host=0.0.0.0", "--set", "mlflow.enabled=false"]
    refused = platform.cli(*command, check=False)
    assert refused.returncode == 1
    assert "`forgearr user add EMAIL --admin`" in refused.stderr
    assert platform.processes() == []

    platform.add_admin()
    platform.cli(*command)
    assert {address for address in platform.listening() if address[0] not in ("127.0.0.1", "::1")} == {
        ("0.0.0.0", httpx.URL(platform.url).port)
    }
    assert platform.http.get("/api/v1/jobs").status_code == 401
    supervisor = platform.supervisor
    supervisor.send_signal(signal.SIGINT)
    supervisor.wait(TIMEOUT)
    assert platform.processes() == []


def test_a_joined_cluster_requires_credentials_and_gets_no_secret(tmp_path: Path) -> None:
    """There Serve may listen on any address, whatever serve.host says, and Ray shows what it passes on."""
    (port,) = unused_ports(1)
    settings = {"ray.address": f"127.0.0.1:{port}", "mlflow.enabled": "false", "auth.sealing_key": SEALING_KEY}
    platform = Platform(tmp_path / "home", settings)
    environment = {name: value for name, value in platform.environment.items() if SEALING_KEY not in value}
    command = [str(BINARIES / "ray"), "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # else a range in which the head's port may be
    temporary = Path(tempfile.mkdtemp(prefix="fgr-", dir="/tmp"))
    command += [f"--temp-dir={temporary}", "--block"]
    with (tmp_path / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        eventually(lambda: is_listening("127.0.0.1", port) or head.poll() is not None)
        assert head.poll() is None, (tmp_path / "ray.log").read_text()
        refused = platform.cli("up", "--detach", check=False)
        assert refused.returncode == 1
        assert "`forgearr user add EMAIL --admin`" in refused.stderr
        platform.add_admin()
        lacking = platform.cli("up", "--detach", check=False)
        assert lacking.returncode == 1
        assert "'auth.sealing_key' is set where `forgearr up` runs, and not on this node" in lacking.stderr

        (platform.home / "forgearr.yaml").write_text(f"auth:\n  sealing_key: {SEALING_KEY}\n")
        platform.up()
        assert platform.http.get("/api/v1/jobs").status_code == 401
        platform.down()
        files = [path for path in temporary.rglob("*") if path.is_file() and not path.is_symlink()]
        assert any(b"FORGEARR_NODE_SECRETS" in path.read_bytes() for path in files)  # Ray logs what it passes on
        assert [path for path in files if SEALING_KEY.encode() in path.read_bytes()] == []
    finally:
        head.terminate()
        head.wait(TIMEOUT)
        platform.http.close()
        shutil.rmtree(temporary, ignore_errors=True)


def test_an_unreachable_cluster_is_an_error(tmp_path: Path) -> None:
    (port,) = unused_ports(1)
    platform = Platform(tmp_path / "home", {"ray.address": f"127.0.0.1:{port}"})
    without_admin = platform.cli("up", "--detach", check=False)
    assert without_admin.returncode == 1
    assert "`forgearr user add EMAIL --admin`" in without_admin.stderr
    platform.add_admin()
    refused = platform.cli("up", "--detach", check=False)
    assert refused.returncode == 1
    assert f"No Ray cluster answers at 127.0.0.1:{port}." in refused.stdout + refused.stderr
