"""Status, processes and open ports of a running installation."""

import json
import subprocess
from contextlib import suppress

import httpx
import pytest

from cluster.runtime import embedded
from tests.support.platform import BINARIES, Platform
from tests.support.waiting import TIMEOUT, eventually

pytestmark = pytest.mark.platform

RUNS = "/api/2.0/mlflow/experiments/search?max_results=1"
COMPONENTS = ["ray", "gateway", "dispatcher", "events", "monitor", "mlflow", "database"]


def test_status_shows_each_component_with_its_address(platform: Platform) -> None:
    all_running = dict.fromkeys(COMPONENTS, "running")
    assert eventually(lambda: states if (states := platform.component_states()) == all_running else None)
    text = eventually(lambda: platform.cli("status"))
    assert platform.url in text.stdout
    assert platform.mlflow_address in text.stdout
    components = json.loads(eventually(lambda: platform.cli("status", "--json")).stdout)
    assert all(component["uptime"] > 0 for component in components if component["component"] != "database")
    assert all(component["address"] for component in components)


def test_every_port_is_on_loopback(platform: Platform) -> None:
    addresses = platform.listening()
    assert {httpx.URL(platform.url).port, httpx.URL(platform.dashboard_url).port} <= {port for _, port in addresses}
    assert {address for address, _ in addresses} <= {"127.0.0.1", "::1"}


def test_ray_and_mlflow_refuse_programs_without_a_password(platform: Platform) -> None:
    mlflow = f"http://{platform.mlflow_address}"
    assert httpx.get(f"{mlflow}{RUNS}").status_code == 401
    assert httpx.get(f"{platform.mlflow_url}{RUNS}").status_code == 200
    token = {"Authorization": f"Bearer {(platform.home / 'keys' / 'ray').read_text()}"}
    for path in ("/api/v0/actors", "/api/jobs/", "/api/v0/logs/file?filename=gcs_server.out", "/logs/", "/nodes"):
        assert httpx.get(f"{platform.dashboard_url}{path}").status_code == 401
        wrong = httpx.get(f"{platform.dashboard_url}{path}", headers={"Authorization": "Bearer wrong"})
        assert wrong.status_code == 403
    assert httpx.get(f"{platform.dashboard_url}/api/v0/actors", headers=token).status_code == 200
    submission = httpx.post(f"{platform.dashboard_url}/api/jobs/", json={"entrypoint": "true"})
    assert submission.status_code == 401
    # A page that rebinds its name gets no cookie and no password along.
    for url in (f"{platform.dashboard_url}/api/v0/actors", f"{mlflow}{RUNS}"):
        assert httpx.get(url, headers={"Host": "10.evil.example", "User-Agent": "Mozilla/5.0"}).is_client_error


def test_ray_refuses_a_program_without_its_token(platform: Platform) -> None:
    command = [str(BINARIES / "ray"), "status", f"--address=127.0.0.1:{platform.environment['FORGEARR_RAY__PORT']}"]
    # Else Ray takes 127.0.0.1 for another address of this machine, and waits for itself there.
    environment = {**platform.environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
    for credentials, is_accepted in (({"RAY_AUTH_MODE": "disabled"}, False), (platform.ray_environment, True)):
        variables = {**environment, **credentials}
        process = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=TIMEOUT, check=False)
        assert (process.returncode == 0) is is_accepted
        assert ("AuthenticationError" not in process.stderr) is is_accepted


def test_no_port_but_the_gateways_tells_a_stranger_more_than_numbers(platform: Platform) -> None:
    """The gateway needs no credential here. HAProxy and Ray export metrics, and the dashboard has its empty page."""
    answers: dict[int, str] = {}
    for address, port in platform.listening() - {("127.0.0.1", httpx.URL(platform.url).port)}:
        host = f"[{address}]" if ":" in address else address
        for path in ("/", "/metrics", "/stats", "/api/v1/jobs"):
            with suppress(httpx.RemoteProtocolError, httpx.ReadError):  # it speaks gRPC
                response = httpx.get(f"http://{host}:{port}{path}", headers={"Host": "evil.example"})
                if response.is_success:
                    answers[port] = response.text
    known = ("<!doctype html>", "# HELP ray_", "# HELP haproxy_", "<!DOCTYPE HTML", "# HELP api_requests_total")
    assert {port: text[:80] for port, text in answers.items() if not text.startswith(known)} == {}


def test_no_password_is_in_a_command_line_a_log_or_the_state(platform: Platform) -> None:
    keys = list((platform.home / "keys").iterdir())
    assert {"mlflow", "ray"} <= {path.name for path in keys}
    command_lines = "\n".join(" ".join(process.cmdline()) for process in platform.processes()).encode()
    folders = [platform.home / "logs", platform.home / "run", embedded.private_folder(platform.home)]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 10
    for key in keys:
        password = key.read_bytes()
        assert password not in command_lines
        assert [path for path in files if password in path.read_bytes()] == []


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
