"""What a platform costs that has nothing to do."""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass

import psutil

from tests.bench.figures import Figure, figure_of_pairs
from tests.support.platform import Platform

GROUP = "At rest, for a minute"

# The first that occurs in the beginning of a command line names the component.
COMPONENTS = {
    "ray::Dispatcher": "dispatcher",
    "ray::Events": "events",
    "ray::Worker": "workers",
    "ray::ServeReplica": "gateway replicas",
    "cluster.cli": "supervisor",
    "ray::ServeController": "Serve controller",
    "ray::HAProxyManager": "Serve HAProxy manager",
    "ray::ProxyActor": "Serve fallback proxy",
    "bin/haproxy": "HAProxy",
    "gcs/gcs_server": "Ray GCS",
    "raylet/raylet": "Ray raylet",
    "ray::DashboardAgent": "Ray dashboard agent",
    "ray::RuntimeEnvAgent": "Ray runtime env agent",
    "ray::IDLE": "Ray idle workers",
    "dashboard": "Ray dashboard",
    "cluster.runtime.patches ray": "Ray head command",
    "mlflow": "MLflow",
    "multiprocessing": "Ray dashboard",
}
BEGINNING = 7
OURS = {"dispatcher", "events", "workers", "gateway replicas", "supervisor"}


@dataclass
class Cost:
    cpu_seconds: float = 0.0
    rss_mb: float = 0.0
    pss_mb: float = 0.0
    processes: int = 0


def figures(platform: Platform, seconds: float) -> list[Figure]:
    """What is ours next to what we stand on: Ray, Serve, HAProxy and MLflow."""
    found = _costs(platform, seconds)
    scale = 60 / seconds
    rows: list[Figure] = []
    mine, others = _total(found, ours=True), _total(found, ours=False)
    for name, unit, attribute in (
        ("Processor", "CPU s/min", "cpu_seconds"),
        ("Memory (PSS)", "MB", "pss_mb"),
        ("Memory (RSS)", "MB", "rss_mb"),
    ):
        factor = scale if attribute == "cpu_seconds" else 1
        pair = (getattr(mine, attribute) * factor, getattr(others, attribute) * factor)
        rows.append(figure_of_pairs(GROUP, name, unit, "Ray, Serve, HAProxy, MLflow", [pair]))
    for name, cost in sorted(found.items(), key=lambda item: -item[1].cpu_seconds):
        memory = f"{cost.pss_mb:.0f} MB PSS, {cost.rss_mb:.0f} MB RSS"
        rows.append(Figure(GROUP, f"  … {name} ({cost.processes})", "CPU s/min", cost.cpu_seconds * scale, memory))
    return rows


def _costs(platform: Platform, seconds: float) -> dict[str, Cost]:
    """CPU seconds over that time, and the memory at its end, of each component."""
    supervisor = psutil.Process(json.loads((platform.home / "run" / "state.json").read_text())["pid"])
    before = {one: _cpu(one) for one in (supervisor, *supervisor.children(recursive=True))}
    time.sleep(seconds)
    found: dict[str, Cost] = {}
    for process, used in before.items():
        if not process.is_running():
            continue
        cost = found.setdefault(_component(process), Cost())
        memory = process.memory_full_info()
        cost.cpu_seconds += _cpu(process) - used
        cost.rss_mb += memory.rss / 2**20
        cost.pss_mb += memory.pss / 2**20
        cost.processes += 1
    return found


def _total(found: Mapping[str, Cost], *, ours: bool) -> Cost:
    parts = [cost for name, cost in found.items() if (name in OURS) == ours]
    return Cost(
        sum(part.cpu_seconds for part in parts),
        sum(part.rss_mb for part in parts),
        sum(part.pss_mb for part in parts),
        sum(part.processes for part in parts),
    )


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def _component(process: psutil.Process) -> str:
    command = " ".join(process.cmdline()[:BEGINNING]) or process.name()
    return next((name for part, name in COMPONENTS.items() if part in command), process.name())
