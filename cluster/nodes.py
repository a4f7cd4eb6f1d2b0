"""What this machine is doing: processor, memory and disk. And which machines there are."""

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
    """Samples of this machine for as long as they are asked for; the first one comes almost at once."""
    psutil.cpu_percent()  # the load is measured since the last call, so the first one only starts the clock
    await asyncio.sleep(FIRST_SAMPLE_SECONDS)
    while True:
        yield _measure()
        await asyncio.sleep(every_seconds)


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the cluster that live, as Ray tells of them."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        raise Unavailable("This process is not part of the cluster, and cannot see its nodes.")
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
