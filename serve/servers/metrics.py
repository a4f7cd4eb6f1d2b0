"""The numbers of servers for Prometheus, and as the plain lines of the documented JSON."""

from collections.abc import Iterator
from typing import NamedTuple

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from cluster.servers.states import ServerState, Snapshot
from serve.servers.views import counts

HELP = {
    "cpu_usage_percent": "Load of all processors.",
    "memory_usage_percent": "Share of the memory that is in use.",
    "gpu_usage_percent": "Load of a GPU.",
    "gpu_memory_usage_percent": "Share of a GPU's memory that is in use.",
    "gpu_temperature_celsius": "Temperature of a GPU.",
    "disk_usage_percent": "Share of a file system that is in use.",
    "up": "Whether at least one of the sources of the server answers.",
}


class Number(NamedTuple):
    server: str
    name: str
    value: float
    labels: tuple[tuple[str, str], ...] = ()


def server_families(snapshot: Snapshot) -> list[Metric]:
    """One family for each kind of number. A number that is not known has no sample."""
    families: dict[tuple[str, tuple[str, ...]], GaugeMetricFamily] = {}
    for number in _numbers(snapshot):
        names = ("server", *(label for label, _ in number.labels))
        if (number.name, names) not in families:
            families[number.name, names] = GaugeMetricFamily(f"server_{number.name}", HELP[number.name], labels=names)
        families[number.name, names].add_metric([number.server, *(value for _, value in number.labels)], number.value)
    return list(families.values())


def plain_lines(snapshot: Snapshot) -> list[str]:
    """`ai_server_cpu_usage_percent 45.2`. Of several GPUs the first counts; disks have no such line."""
    lines: dict[str, str] = {}
    for number in _numbers(snapshot):
        if number.name.endswith("_usage_percent") and not number.name.startswith("disk"):
            name = f"{number.server}_{number.name}"
            lines.setdefault(name, f"{name} {number.value:g}")
    total = counts(snapshot)
    return [
        *lines.values(),
        f"system_total_servers {total.total_servers}",
        f"system_online_servers {total.online_servers}",
    ]


def _numbers(snapshot: Snapshot) -> Iterator[Number]:
    for server, state in snapshot.servers.items():
        yield Number(server, "up", float(state.server_status.status in ("online", "warning")))
        for name, value, *labels in _values(state):
            if value is not None:
                yield Number(server, name, value, tuple(labels))


def _values(state: ServerState) -> Iterator[tuple[str, float | None, *tuple[tuple[str, str], ...]]]:
    values = state.values
    if values.cpu:
        yield "cpu_usage_percent", values.cpu.usage_percent
    if values.memory:
        yield "memory_usage_percent", values.memory.usage_percent
    for index, gpu in enumerate(values.gpus):
        label = ("gpu", str(index))
        yield "gpu_usage_percent", gpu.usage_percent, label
        yield "gpu_memory_usage_percent", gpu.memory_usage_percent, label
        yield "gpu_temperature_celsius", gpu.temperature, label
    for disk in values.disks:
        yield "disk_usage_percent", disk.usage_percent, ("mount_point", disk.mount_point)
