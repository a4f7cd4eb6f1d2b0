"""The state of each component of this installation, for `forgearr status`."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import psutil

from cluster.runtime import probes, processes, run_state
from cluster.runtime.run_state import RunState
from cluster.settings import Settings

ACTORS = ("dispatcher", "events", "monitor")


@dataclass(frozen=True)
class Status:
    component: str
    state: str  # such as running, off, starting, degraded, unhealthy, stopped, unknown
    address: str | None = None
    uptime: float | None = None  # seconds
    version: str | None = None

    @property
    def is_healthy(self) -> bool:
        return self.state in ("running", "off")


def collect(settings: Settings) -> list[Status]:
    """Return the status of every component. Unknown values are None."""
    run = run_state.current_run()
    if run is None:
        return [Status(name, "stopped") for name in ("ray", "gateway", *ACTORS, "mlflow", "database")]
    gateway_health = probes.gateway_health(run.url)
    return [
        _ray(run),
        _gateway(run, gateway_health),
        *_actors(run, gateway_health),
        _mlflow(run),
        _database(settings, gateway_health),
    ]


def _ray(run: RunState) -> Status:
    host, _, port = run.ray_address.rpartition(":")
    state = "running" if processes.is_listening(host, int(port)) else _unreachable_state(run)
    return Status("ray", state, run.ray_address, _uptime(run), version("ray"))


def _gateway(run: RunState, gateway_health: Mapping[str, Any] | None) -> Status:
    if gateway_health is None:
        return Status("gateway", _unreachable_state(run), run.url)
    return Status(
        "gateway", _gateway_state(gateway_health), run.url, gateway_health["uptime"], gateway_health.get("version")
    )


def _gateway_state(gateway_health: Mapping[str, Any]) -> str:
    """Derive the state from the gateway's own components. Outside services do not count: a restart repairs none."""
    components = gateway_health.get("components", {})
    if components.get("database") == "disconnected":
        return "unhealthy"
    return "running" if set(components.values()) <= {"connected", "running"} else "degraded"


def _actors(run: RunState, gateway_health: Mapping[str, Any] | None) -> list[Status]:
    components = gateway_health.get("components", {}) if gateway_health else {}
    actor_processes = {name: processes.find_by_command(f"ray::{name.capitalize()}") for name in ACTORS}
    return [
        Status(name, components.get(name, "unknown"), process and f"process {process.pid}", _age(process), run.version)
        for name, process in actor_processes.items()
    ]


def _mlflow(run: RunState) -> Status:
    if run.mlflow_uri is None:
        return Status("mlflow", "off")
    if probes.is_mlflow_up(run.mlflow_uri):
        uptime = _age(processes.find_by_command("mlflow"))
        return Status("mlflow", "running", run.mlflow_uri, uptime, version("mlflow"))
    return Status("mlflow", "starting", run.mlflow_uri)


def _database(settings: Settings, gateway_health: Mapping[str, Any] | None) -> Status:
    scheme, _, location = settings.database_url.partition("://")
    address = f"{scheme.partition('+')[0]}://{location.rpartition('@')[2]}"
    if gateway_health is None:
        return Status("database", "unknown", address)
    return Status(
        "database",
        "running" if gateway_health.get("database") == "connected" else str(gateway_health.get("database")),
        address,
    )


def _age(process: psutil.Process | None) -> float | None:
    return time.time() - process.create_time() if process else None


def _unreachable_state(run: RunState) -> str:
    return "stopped" if run.ready else "starting"


def _uptime(run: RunState) -> float:
    return (datetime.now(UTC) - run.started_at).total_seconds()
