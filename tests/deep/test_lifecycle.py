"""Start, failure, stop and restart of an installation, with the real command line and real processes."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from cluster.runtime.processes import is_listening
from tests.deep.ray_node import kill_node, start_node
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
    with ray_head(tmp_path) as (port, temporary):
        settings = {"ray.address": f"127.0.0.1:{port}", "mlflow.enabled": "false", "auth.sealing_key": SEALING_KEY}
        platform = Platform(tmp_path / "home", settings)
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
        platform.http.close()


def test_actors_of_an_earlier_up_are_replaced(tmp_path: Path) -> None:
    """On a cluster of others, actors outlive a killed supervisor. They have its code and its settings."""
    with ray_head(tmp_path) as (port, _):
        settings = {"ray.address": f"127.0.0.1:{port}", "mlflow.enabled": "false"}
        platform, other = (Platform(tmp_path / name, settings) for name in ("home", "other"))
        for installation in (platform, other):
            installation.add_admin()
        platform.up()
        before = named_actors(platform, port)
        platform.supervisor.kill()
        platform.cli("up", "--detach", "--set", "jobs.workers=1")
        after = named_actors(platform, port)
        assert [name.partition("-")[0] for name in after] == ["dispatcher", "events", "monitor", "worker"]
        assert set(before) & set(after) == {"dispatcher", "events", "monitor"}

        refused = other.cli("up", "--detach", check=False)
        assert refused.returncode == 1
        assert "Ray Serve refuses the gateway: Prefix / is being used by application" in refused.stderr
        assert named_actors(platform, port) == after
        assert platform.http.get("/api/v1/jobs").status_code == 401
        platform.down()
        assert named_actors(platform, port) == []
        for installation in (platform, other):
            installation.http.close()


def test_a_node_of_another_version_gets_nothing_to_do(tmp_path: Path) -> None:
    with ray_head(tmp_path) as (port, _):
        settings = {"ray.address": f"127.0.0.1:{port}", "mlflow.enabled": "false"}
        platform = Platform(tmp_path / "home", settings)
        platform.add_admin()
        platform.http.headers["X-API-Key"] = platform.cli(
            "key", "create", "laptop", "--user", "ada@example.com"
        ).stdout.strip()
        platform.up()
        with other_version(tmp_path, port):
            log = platform.home / "logs" / "dispatcher.jsonl"
            eventually(lambda: "has Forgearr 0.0.9, and this installation" in log.read_text())
            labelled = platform.submit("probe", resources={"cpus": 1, "labels": {"role": "trainer"}})
            heavy = platform.submit("probe", resources={"cpus": 1})
            assert platform.wait_for(heavy)["state"] == "succeeded"
            assert "the cluster has 2 CPU" in platform.job(labelled)["waiting_for"]
            platform.down()
            refused = platform.cli("up", "--detach", check=False)
            assert refused.returncode == 1
            assert "install the same version there and restart its Ray" in refused.stderr
        platform.http.close()


@contextmanager
def other_version(folder: Path, port: int) -> Generator[None]:
    """A second node of the cluster, whose environment has another version of Forgearr."""
    metadata = folder / "packages" / "forgearr-0.0.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: forgearr\nVersion: 0.0.9\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORGEARR_")}
    environment["PYTHONPATH"] = str(metadata.parent.parent)
    node = start_node(f"127.0.0.1:{port}", environment, folder / "node.log")
    try:
        yield
    finally:
        kill_node(node)


@contextmanager
def ray_head(folder: Path) -> Generator[tuple[int, Path]]:
    """A Ray cluster that somebody else has started; yields its port and its folder for logs."""
    (port,) = unused_ports(1)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORGEARR_")}
    command = [str(BINARIES / "ray"), "start", "--head", f"--port={port}", "--num-cpus=2", "--include-dashboard=false"]
    command += ["--min-worker-port=0", "--max-worker-port=0"]  # else a range in which the head's port may be
    temporary = Path(tempfile.mkdtemp(prefix="fgr-", dir="/tmp"))
    command += [f"--temp-dir={temporary}", "--block"]
    with (folder / "ray.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        eventually(lambda: is_listening("127.0.0.1", port) or head.poll() is not None)
        assert head.poll() is None, (folder / "ray.log").read_text()
        yield port, temporary
    finally:
        head.terminate()
        head.wait(TIMEOUT)
        shutil.rmtree(temporary, ignore_errors=True)


def named_actors(platform: Platform, port: int) -> list[str]:
    """The names of the installation's actors on a cluster."""
    script = f"""if True:
        import ray
        from ray.util import list_named_actors
        from cluster.settings import get_settings
        ray.init("127.0.0.1:{port}", log_to_driver=False, logging_level="ERROR")
        namespace = get_settings().ray_namespace
        print(*sorted(a["name"] for a in list_named_actors(all_namespaces=True) if a["namespace"] == namespace))
    """
    return platform.run([sys.executable, "-c", script]).stdout.split()


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
