"""Metrics of this machine (processor, memory, disk), and the list of the cluster's nodes."""

import asyncio
import platform
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any, TypedDict

import psutil

from cluster.errors import Unavailable
from cluster.settings import home

FIRST_SAMPLE_SECONDS = 0.25


class NodeMetrics(TypedDict):
    node: str
    cpu_percent: float
    cpu_count: int | None
    memory_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    disk_percent: float
    disk_used_bytes: int
    disk_total_bytes: int
    timestamp: datetime


async def stream_metrics(every_seconds: float) -> AsyncIterator[NodeMetrics]:
    """Yield metrics of this machine at an interval, without end. The first ones come almost at once."""
    psutil.cpu_percent()  # measures the load since the previous call, so the first call only starts the measurement
    await asyncio.sleep(FIRST_SAMPLE_SECONDS)
    while True:
        yield _measure()
        await asyncio.sleep(every_seconds)


def alive_nodes() -> list[dict[str, Any]]:
    """Return the living nodes of the cluster, in Ray's format."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        raise Unavailable("This process is not part of the cluster, so it cannot list the nodes.")
    return [node for node in ray.nodes() if node["Alive"]]


def _measure() -> NodeMetrics:
    memory = psutil.virtual_memory()
    disk = psutil.disk_usage(str(home()))
    return {
        "node": platform.node(),
        "cpu_percent": psutil.cpu_percent(),
        "cpu_count": psutil.cpu_count(),
        "memory_percent": memory.percent,
        "memory_used_bytes": memory.total - memory.available,
        "memory_total_bytes": memory.total,
        "disk_percent": disk.percent,
        "disk_used_bytes": disk.used,
        "disk_total_bytes": disk.total,
        "timestamp": datetime.now(UTC),
    }
