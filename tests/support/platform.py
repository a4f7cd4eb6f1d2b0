"""A whole platform for a test: `forgearr up --detach` in its own home, and methods that kill parts of it."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from fcntl import LOCK_EX, flock
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psutil
import pytest

from cluster.runtime import embedded
from cluster.runtime.processes import MARKER_VARIABLE, is_listening
from cluster.secrets import MLFLOW_USER
from tests.support.waiting import TIMEOUT, eventually

BINARIES = Path(sys.executable).parent
LOCK = Path(tempfile.gettempdir()) / "forgearr-test.lock"
WAVE = 60


class Platform:
    """One installation. Every call uses the real command line or the real HTTP API."""

    def __init__(self, home: Path, settings: dict[str, str] | None = None) -> None:
        port, ray, dashboard, mlflow = unused_ports(4)
        self.home = home
        self.url = f"http://127.0.0.1:{port}"
        self.dashboard_url = f"http://127.0.0.1:{dashboard}"
        self.mlflow_address = f"127.0.0.1:{mlflow}"
        chosen = {
            "serve.port": port,
            "ray.port": ray,
            "ray.dashboard_port": dashboard,
            "mlflow.port": mlflow,
            **(settings or {}),
        }
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("FORGEARR_")}
        variables = {f"FORGEARR_{key.upper().replace('.', '__')}": str(value) for key, value in chosen.items()}
        self.environment = {**inherited, **variables, "FORGEARR_HOME": str(home), "COLUMNS": "160"}
        self.http = httpx.Client(base_url=self.url, timeout=TIMEOUT)

    @property
    def mlflow_url(self) -> str:
        """MLflow's URL with the password of this installation."""
        return f"http://{MLFLOW_USER}:{(self.home / 'keys' / 'mlflow').read_text()}@{self.mlflow_address}"

    @property
    def ray_environment(self) -> dict[str, str]:
        """The variables of Ray's clients."""
        return {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(self.home / "keys" / "ray")}

    def cli(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `forgearr …`. One `up` at a time: two could choose the same ports for processes that Ray starts."""
        with LOCK.open("w") as lock:
            if "up" in arguments:
                flock(lock, LOCK_EX)
            return self.run([str(BINARIES / "forgearr"), *arguments], check=check)

    def run(self, command: list[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
        process = subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=TIMEOUT, check=False
        )
        if check:
            assert process.returncode == 0, (
                f"{command} ended with {process.returncode}:\n{process.stdout}\n{process.stderr}"
            )
        return process

    def submit_to_ray(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `ray job submit` as docs/jobs.md says."""
        script = 'eval "$(forgearr access --shell)" && exec ray job submit -- "$@"'
        path = f"{BINARIES}:{os.environ['PATH']}"
        return self.run(["env", f"PATH={path}", "bash", "-euc", script, "bash", *command], check=check)

    def add_admin(self) -> None:
        self.add_user("ada@example.com", "--admin")

    def add_user(self, email: str, *options: str) -> None:
        command = [str(BINARIES / "forgearr"), "user", "add", email, *options, "--password-stdin"]
        password = "correct horse battery\n"
        subprocess.run(command, input=password, env=self.environment, text=True, check=True, timeout=TIMEOUT)

    def up(self) -> None:
        self.cli("up", "--detach")

    def down(self) -> None:
        self.cli("down")

    def submit(self, kind: str = "probe", **request: Any) -> str:
        response = self.http.post("/api/v1/jobs", json={"kind": kind, **request})
        assert response.status_code == 201, response.text
        return response.json()["id"]

    def keep_busy(self, jobs: list[str], spec: dict[str, Any]) -> None:
        """Submit jobs until ten run at once, and add their ids to `jobs`."""
        self._submit_wave(jobs, spec)

        def busy() -> bool:
            if self.count("running") >= 10:
                return True
            if self.count("running") == self.count("queued") == 0:
                self._submit_wave(jobs, spec)
            return False

        eventually(busy)

    def _submit_wave(self, jobs: list[str], spec: dict[str, Any]) -> None:
        with ThreadPoolExecutor(8) as pool:
            jobs += pool.map(self._submit_with_retries, [spec] * WAVE)

    def _submit_with_retries(self, spec: dict[str, Any]) -> str:
        """Retry until there is a response: a gateway may die between the request and the response."""
        headers = {"Idempotency-Key": uuid4().hex}

        def send() -> str:
            response = self.http.post("/api/v1/jobs", json={"kind": "probe", "spec": spec}, headers=headers)
            assert response.status_code == 201, response.text
            return response.json()["id"]

        return eventually(send)

    def job(self, job_id: str) -> dict[str, Any]:
        response = self.http.get(f"/api/v1/jobs/{job_id}")
        assert response.status_code == 200, response.text
        return response.json()

    def events(self, job_id: str, event_type: str | None = None) -> list[dict[str, Any]]:
        """The journal of a job, or its entries of one type."""
        events: list[dict[str, Any]] = []
        after: int | None = 0
        while after is not None:
            response = self.http.get(f"/api/v1/jobs/{job_id}/events", params={"after": after, "limit": 500})
            assert response.status_code == 200, response.text
            events += response.json()["items"]
            after = response.json()["next_after"]
        return [event for event in events if event_type in (None, event["type"])]

    def trained_steps(self, job_id: str) -> list[int]:
        """The steps of a training, in their order. None that a checkpoint has saved may be trained again."""
        saved, trained = 0, list[int]()
        for event in self.events(job_id):
            metrics = event["data"].get("metrics", {})
            if event["type"] == "checkpoint":
                saved = max(trained, default=0)
            elif "loss" in metrics:
                assert metrics["step"] > saved
                trained.append(int(metrics["step"]))
        return trained

    def count(self, state: str) -> int:
        response = self.http.get("/api/v1/jobs", params={"state": state, "kind": "probe", "limit": 1})
        assert response.status_code == 200, response.text
        return response.json()["total"]

    def wait_for(self, job_id: str, *states: str) -> dict[str, Any]:
        awaited = states or ("succeeded", "failed", "cancelled")
        return eventually(lambda: job if (job := self.job(job_id))["state"] in awaited else None)

    @property
    def supervisor(self) -> psutil.Process:
        return psutil.Process(json.loads((self.home / "run" / "state.json").read_text())["pid"])

    def component_states(self) -> dict[str, str]:
        process = self.cli("status", "--json", check=False)
        return {component["component"]: component["state"] for component in json.loads(process.stdout)}

    def wait_for_gateway(self) -> None:
        """Wait until the gateway runs: it is degraded whenever one of its parts takes longer than a second."""
        eventually(lambda: self.component_states()["gateway"] == "running")

    def wait_for_mlflow(self) -> None:
        """Wait until MLflow responds. The rest of the platform does not wait for it."""
        eventually(lambda: httpx.get(f"http://{self.mlflow_address}/health").is_success)

    def processes(self, title: str = "", *, mentions: str = "") -> list[psutil.Process]:
        """The living processes of this installation whose command line begins with `title` and contains `mentions`."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARKER_VARIABLE) != str(self.home) or process.status() == psutil.STATUS_ZOMBIE:
                    continue
                command = " ".join(process.cmdline())
                if command.startswith(title) and mentions in command:
                    found.append(process)
            except (psutil.Error, OSError):
                continue
        return found

    def listening(self) -> set[tuple[str, int]]:
        """(address, port) of everything that its processes listen on."""
        found: set[tuple[str, int]] = set()
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                for connection in process.net_connections("tcp"):
                    if connection.status == psutil.CONN_LISTEN:
                        address, port = connection.laddr
                        found.add((address.removeprefix("::ffff:"), port))
        return found

    def cut_the_power(self) -> None:
        """Kill every process at once: the supervisor, Ray and all that runs on it, HAProxy, MLflow."""
        supervisor = self.supervisor
        while victims := [process for process in (supervisor, *self.processes()) if process.is_running()]:
            for victim in victims:
                with suppress(psutil.NoSuchProcess):
                    victim.kill()
            psutil.wait_procs(victims, timeout=5)

    def kill(self, title: str, number: signal.Signals = signal.SIGKILL) -> list[int]:
        """Send a signal to every process of that title; there must be one."""
        victims = self.processes(title)
        assert victims, f"no process '{title}' among {[p.cmdline()[:1] for p in self.processes()]}"
        for victim in victims:
            with suppress(psutil.NoSuchProcess):
                victim.send_signal(number)
        return [victim.pid for victim in victims]


def unused_ports(count: int) -> list[int]:
    """Ports that nothing listens on, below the range from which the system assigns ports."""
    ports: list[int] = []
    while len(ports) < count:
        port = random.randint(10_100, 19_900)
        if port not in ports and not is_listening("127.0.0.1", port):
            ports.append(port)
    return ports


@contextmanager
def running_platform(
    settings: dict[str, str] | None = None,
    *,
    with_admin: bool = False,
    disk_mb: int | None = None,
    before_up: Callable[["Platform"], object] | None = None,
) -> Generator[Platform]:
    """A running platform, with an administrator if it requires credentials. After the block it leaves no process.

    With `disk_mb`, its home is a disk of that size.
    """
    home = Path(tempfile.mkdtemp(prefix="forgearr-test-", dir="/tmp"))
    if disk_mb:
        mount_disk(home, disk_mb)
    platform = Platform(home, settings)
    try:
        if with_admin:
            platform.add_admin()
        if before_up:
            before_up(platform)
        platform.up()
        yield platform
    finally:
        platform.cli("down", check=False)
        platform.http.close()
        leftovers = platform.processes()
        for process in leftovers:
            process.kill()
        if disk_mb:
            unmount_disk(home)
        shutil.rmtree(home, ignore_errors=True)
        shutil.rmtree(embedded.private_folder(home), ignore_errors=True)
        assert not leftovers, f"left running after down: {leftovers}"


def mount_disk(folder: Path, megabytes: int) -> None:
    """Give a folder a disk of its own, in memory."""
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=0700", "tmpfs", str(folder)]
    if subprocess.run(command, check=False).returncode:
        pytest.skip("only an administrator of the machine can mount a small disk")


def unmount_disk(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_disk(file: Path, leave_bytes: int = 0) -> None:
    """Let a file grow until this much is free on its disk."""
    with file.open("ab", buffering=0) as filler, suppress(OSError):
        while (free := shutil.disk_usage(file.parent).free) > leave_bytes:
            filler.write(bytes(min(free - leave_bytes, 1_000_000)))
