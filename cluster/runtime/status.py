"""How each component of this installation is, as `forgearr status` tells it."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import psutil

from cluster.runtime import probes, processes, run_state
from cluster.runtime.run_state import Running
from cluster.settings import Settings

ACTORS = ("dispatcher", "events")


@dataclass(frozen=True)
class Status:
    component: str
    state: str  # running, starting, degraded, stopped, unknown; "external" and "off" are as they should be too
    address: str | None = None
    uptime: float | None = None  # seconds
    version: str | None = None

    @property
    def is_well(self) -> bool:
        return self.state in ("running", "off")


def collect(settings: Settings) -> list[Status]:
    """Every component. What cannot be known is None."""
    run = run_state.current()
    if run is None:
        return [Status(name, "stopped") for name in ("ray", "gateway", *ACTORS, "mlflow", "database")]
    told = probes.of_gateway(run.url)
    return [_ray(run), _gateway(run, told), *_actors(run, told), _mlflow(run), _database(settings, told)]


def _ray(run: Running) -> Status:
    host, _, port = run.ray_address.rpartition(":")
    state = "running" if processes.is_listening(host, int(port)) else _not_yet(run)
    return Status("ray", state, run.ray_address, _since(run), version("ray"))


def _gateway(run: Running, told: Mapping[str, Any] | None) -> Status:
    if told is None:
        return Status("gateway", _not_yet(run), run.url)
    return Status("gateway", _state_of_gateway(told), run.url, told["uptime"], told.get("version"))


def _state_of_gateway(told: Mapping[str, Any]) -> str:
    """By its own parts: that an outside service is away is nothing that a restart would heal."""
    parts = told.get("components", {})
    if parts.get("database") == "disconnected":
        return "unhealthy"
    return "running" if set(parts.values()) <= {"connected", "running"} else "degraded"


def _actors(run: Running, told: Mapping[str, Any] | None) -> list[Status]:
    components = told.get("components", {}) if told else {}
    found = {name: processes.find_ours(f"ray::{name.capitalize()}") for name in ACTORS}
    return [
        Status(name, components.get(name, "unknown"), process and f"process {process.pid}", _age(process), run.version)
        for name, process in found.items()
    ]


def _mlflow(run: Running) -> Status:
    if run.mlflow_uri is None:
        return Status("mlflow", "off")
    if probes.is_mlflow_up(run.mlflow_uri):
        uptime = _age(processes.find_ours("mlflow"))
        return Status("mlflow", "running", run.mlflow_uri, uptime, version("mlflow"))
    return Status("mlflow", "starting", run.mlflow_uri)


def _database(settings: Settings, told: Mapping[str, Any] | None) -> Status:
    scheme, _, place = settings.database_url.partition("://")
    address = f"{scheme.partition('+')[0]}://{place.rpartition('@')[2]}"
    if told is None:
        return Status("database", "unknown", address)
    return Status("database", "running" if told.get("database") == "connected" else str(told.get("database")), address)


def _age(process: psutil.Process | None) -> float | None:
    return time.time() - process.create_time() if process else None


def _not_yet(run: Running) -> str:
    return "stopped" if run.ready else "starting"


def _since(run: Running) -> float:
    return (datetime.now(UTC) - run.started_at).total_seconds()
