"""The command line: light imports, clear errors, and the state of the running platform."""

import asyncio
import fcntl
import os
import socket
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cluster.cli import app
from cluster.runtime import processes, run_state, supervisor
from cluster.runtime.run_state import RunState
from cluster.settings import get_settings
from tests.support.platform import unused_ports
from tests.support.waiting import TIMEOUT

HEAVY = {"alembic", "fastapi", "httpx", "mlflow", "pydantic", "ray", "sqlalchemy", "torch"}


def forgearr(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in its own process, with this test's home."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def save_run(process: psutil.Process, *, ports: list[int] | None = None) -> RunState:
    run = RunState(
        pid=process.pid,
        create_time=process.create_time(),
        version="0.1.0",
        url="http://127.0.0.1:18080",
        started_at=datetime.now(UTC),
        ready=True,
        ports=ports or [],
        ray_address="127.0.0.1:16380",
        dashboard_url=None,
        mlflow_uri=None,
        has_own_mlflow=False,
    )
    run_state.save_run(run)
    return run


def stubborn_process(environment: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start a process that ignores SIGTERM."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process.stdout as output:
        output.readline()
    return process


def test_the_command_line_imports_no_heavy_library() -> None:
    code = "import sys, cluster.cli; print(*{name.partition('.')[0] for name in sys.modules})"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(process.stdout.split())


def test_help_names_the_commands_and_imports_no_heavy_library() -> None:
    code = "import sys; from cluster.cli import main\ntry: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    process = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    for command in ("up", "down", "status", "doctor", "logs", "config", "user", "key", "jobs"):
        assert f" {command} " in process.stdout
    assert not HEAVY & {name.partition(".")[0] for name in process.stderr.split()}


def test_version() -> None:
    assert forgearr("--version").stdout == "Forgearr 0.1.0\n"


def test_an_error_is_one_sentence_without_a_traceback(home: Path) -> None:
    process = forgearr("config", "show", "--set", "serve.prot=1")
    assert process.returncode == 1
    assert process.stdout == ""
    sentence = "Unknown setting 'serve.prot' (set to 1 by command line); docs/settings.md lists all settings.\n"
    assert process.stderr == sentence


def test_config_show_has_values_and_origins_but_no_secret(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key = "a-signing-key-of-more-than-32-characters"
    monkeypatch.setenv("FORGEARR_AUTH__SIGNING_KEY", key)
    result = CliRunner().invoke(app, ["config", "show", "--set", "serve.port=8010"])
    assert result.exit_code == 0
    shown = [line.rstrip().split(maxsplit=2) for line in result.output.splitlines()]
    assert ["serve.port", "8010", "command line"] in shown
    assert ["serve.host", "127.0.0.1", "configs/forgearr.yaml"] in shown
    assert ["serve.allowed_hosts", "[]", "configs/forgearr.yaml"] in shown
    assert key not in result.output


def test_status_and_down_without_a_running_platform(home: Path) -> None:
    result = CliRunner().invoke(app, ["status"])
    assert result.exit_code == 1
    assert {line.split()[1] for line in result.output.splitlines()[1:]} == {"stopped"}
    assert CliRunner().invoke(app, ["down"]).output == "Forgearr is not running.\n"


def test_a_second_up_fails_with_a_message(home: Path) -> None:
    save_run(psutil.Process())
    expected = (
        f"Forgearr is already running at http://127.0.0.1:18080 (process {os.getpid()}); `forgearr down` stops it.\n"
    )
    with (run_state.folder() / "lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        for arguments in (["up"], ["up", "--detach"]):
            process = forgearr(*arguments)
            assert (process.returncode, process.stdout, process.stderr) == (1, "", expected)
    assert run_state.current_url() == "http://127.0.0.1:18080"


def test_access_shows_the_passwords_of_what_runs_here(home: Path) -> None:
    assert forgearr("access").stderr == "Forgearr does not run; `forgearr up` starts it.\n"
    run = save_run(psutil.Process())
    assert CliRunner().invoke(app, ["access"]).output == ""  # MLflow and Ray are those of others
    own = {"dashboard_url": "http://127.0.0.1:8265", "mlflow_uri": "http://127.0.0.1:5000", "has_own_mlflow": True}
    run_state.save_run(run.model_copy(update=own))
    shown = CliRunner().invoke(app, ["access"]).output
    passwords = {name: (home / "keys" / name).read_text() for name in ("mlflow", "ray")}
    assert shown.split() == [
        *("MLflow", "http://127.0.0.1:5000", "user", "forgearr", "password", passwords["mlflow"]),
        *("Ray", "dashboard", "http://127.0.0.1:8265", "token", passwords["ray"]),
    ]
    variables = 'eval "$("$0" -m cluster.cli access --shell)"; env'
    process = subprocess.run(["sh", "-c", variables, sys.executable], capture_output=True, text=True, check=True)
    assert set(process.stdout.splitlines()) >= {
        "MLFLOW_TRACKING_URI=http://127.0.0.1:5000",
        "MLFLOW_TRACKING_USERNAME=forgearr",
        f"MLFLOW_TRACKING_PASSWORD={passwords['mlflow']}",
        "RAY_API_SERVER_ADDRESS=http://127.0.0.1:8265",
        "RAY_AUTH_MODE=token",
        f"RAY_AUTH_TOKEN_PATH={home / 'keys' / 'ray'}",
    }


def test_a_reused_pid_is_not_the_platform(home: Path) -> None:
    run = save_run(psutil.Process())
    run_state.save_run(run.model_copy(update={"create_time": run.create_time - 100}))
    assert run_state.last_run() is not None
    assert run_state.current_run() is None
    assert run_state.current_url() == get_settings().url


def test_the_state_file_of_another_version_is_ignored(home: Path) -> None:
    (run_state.folder() / "state.json").write_text('{"pid": 1}')
    assert run_state.last_run() is None


def test_the_error_of_a_busy_port_names_the_setting(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port: int = listener.getsockname()[1]
        monkeypatch.setenv("FORGEARR_RAY__PORT", str(port))
        monkeypatch.setenv("FORGEARR_SERVE__PORT", str(unused_ports(1)[0]))
        process = forgearr("up")
    assert (process.returncode, process.stdout) == (1, "")
    assert process.stderr == (
        f"Port {port} is taken by process {os.getpid()} ({psutil.Process().name()}): stop that, or choose another one "
        f"with `forgearr up --set ray.port={port + 10}`.\n"
    )
    assert run_state.last_run() is None


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("serve.host=0.0.0.0", "serve.host is 0.0.0.0"),
        ("ray.address=127.0.0.1:9", "Serve listens where the operator of the Ray cluster at 127.0.0.1:9 has chosen"),
    ],
)
def test_a_gateway_that_others_reach_is_not_started_without_credentials(home: Path, setting: str, reason: str) -> None:
    done = forgearr("up", "--set", setting, "--set", "auth.required=false")
    assert done.returncode == 1
    assert done.stderr.startswith(f"auth.required is off and {reason}: anyone")
    assert run_state.last_run() is None


def test_down_ends_the_processes_of_a_killed_supervisor(home: Path) -> None:
    get_settings()
    environment = processes.marked_environment()
    orphan = stubborn_process(environment)
    unmarked = stubborn_process({**environment, processes.MARKER_VARIABLE: f"{home}-of-somebody-else"})
    try:
        steps: list[tuple[str, str]] = []
        asyncio.run(supervisor.stop(lambda step, detail: steps.append((step, detail))))
        assert steps == [("recovered", "ended 1 processes that were left behind")]
        assert not psutil.pid_exists(orphan.pid)
        assert unmarked.poll() is None
    finally:
        for process in (orphan, unmarked):
            process.kill()
            process.wait()
