"""What a figure is, and how two things are compared on a machine that is never quite quiet."""

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from statistics import median
from typing import Any

import psutil

PACKAGES = (
    "forgearr",
    "ray",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "dbos",
    "procrastinate",
    "mlflow",
)


@dataclass
class Figure:
    """A number of ours, next to its peer's from the same run. The ratio is ours to the peer's, round by round."""

    group: str
    name: str
    unit: str
    ours: float
    peer_name: str = ""
    peer: float | None = None
    ratio: float | None = None
    note: str = ""
    rounds: list[Any] = field(default_factory=list[Any])


def compare(
    group: str,
    name: str,
    unit: str,
    ours: Callable[[], float],
    peer_name: str,
    peer: Callable[[], float],
    rounds: int = 3,
    note: str = "",
) -> Figure:
    """Ours, peer, ours, peer …: what else the machine does meanwhile hits both, and the median forgets the worst."""
    pairs = [(ours(), peer()) for _ in range(rounds)]
    return figure_of_pairs(group, name, unit, peer_name, pairs, note)


def figure_of_pairs(
    group: str, name: str, unit: str, peer_name: str, pairs: Sequence[tuple[float, float]], note: str = ""
) -> Figure:
    return Figure(
        group=group,
        name=name,
        unit=unit,
        ours=median(one for one, _ in pairs),
        peer_name=peer_name,
        peer=median(other for _, other in pairs),
        ratio=median(one / other for one, other in pairs),
        note=note,
        rounds=[list(pair) for pair in pairs],
    )


def percentile(values: Sequence[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def machine() -> dict[str, Any]:
    return {
        "cores": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
        "versions": {name: version(name) for name in PACKAGES},
    }
