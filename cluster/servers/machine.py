"""Measures this machine: processor, memory, GPUs, disks and networks."""

import asyncio
import time
from dataclasses import dataclass

import psutil

from cluster.servers.file_systems import FileSystems, Size
from cluster.servers.gpus import read_gpus
from cluster.services.capabilities.server_values import (
    GB,
    Cpu,
    Disk,
    FileSystem,
    Memory,
    Network,
    ServerValues,
    in_units,
    percent,
)

CPU_SENSORS = ("coretemp", "k10temp", "zenpower", "cpu_thermal", "acpitz")
"""The first of these that the machine has is the temperature of its processor."""
PSEUDO_FILE_SYSTEMS = frozenset({"squashfs", "iso9660", "overlay", "tmpfs", "devtmpfs", "autofs"})


@dataclass(frozen=True)
class Traffic:
    at: float
    sent: int
    received: int


class Machine:
    """The measurements of this machine. Rates are those since the measurement before, so the first has none."""

    def __init__(self, file_systems: list[str]) -> None:
        self._declared = file_systems
        self._sizes = FileSystems()
        self._cpu_times: tuple[float, float] | None = None  # busy and all
        self._traffic: dict[str, Traffic] = {}

    async def read(self) -> ServerValues:
        # In a thread: a sensor may answer slowly, too.
        values, mounts = await asyncio.to_thread(self._measure)
        sizes = await self._sizes.sizes([*dict.fromkeys([*mounts, *self._declared])])
        values.disks = [_disk(mount_point, device, sizes[mount_point]) for mount_point, device in mounts.items()]
        if self._declared:
            values.filesystems = [_file_system(mount_point, sizes[mount_point]) for mount_point in self._declared]
        return values

    async def close(self) -> None:
        await self._sizes.close()

    def _measure(self) -> tuple[ServerValues, dict[str, str]]:
        memory = psutil.virtual_memory()
        values = ServerValues(
            cpu=Cpu(
                usage_percent=self._cpu_percent(),
                cores=psutil.cpu_count(),
                temperature=_cpu_temperature(),
                load_average=[round(load, 2) for load in psutil.getloadavg()],
            ),
            memory=Memory(
                used_gb=in_units(memory.total - memory.available, GB),
                total_gb=in_units(memory.total, GB),
                usage_percent=percent(memory.total - memory.available, memory.total),
                available_gb=in_units(memory.available, GB),
                cached_gb=in_units(getattr(memory, "cached", None), GB),
            ),
            gpus=read_gpus(),
            network=self._networks(),
            uptime_seconds=round(time.time() - psutil.boot_time()),
        )
        return values, _mounts()

    def _cpu_percent(self) -> float | None:
        times = psutil.cpu_times()
        # Linux counts the time of guests within that of users.
        total = sum(times) - getattr(times, "guest", 0) - getattr(times, "guest_nice", 0)
        busy = total - times.idle - getattr(times, "iowait", 0)
        before, self._cpu_times = self._cpu_times, (busy, total)
        return percent(max(busy - before[0], 0), total - before[1]) if before else None

    def _networks(self) -> list[Network]:
        now = time.monotonic()
        states = psutil.net_if_stats()
        networks: list[Network] = []
        for interface, counters in psutil.net_io_counters(pernic=True).items():
            if interface == "lo":
                continue
            traffic = Traffic(now, counters.bytes_sent, counters.bytes_recv)
            before = self._traffic.get(interface)
            self._traffic[interface] = traffic
            networks.append(
                Network(
                    interface=interface,
                    is_up=states[interface].isup if interface in states else None,
                    bytes_sent=traffic.sent,
                    bytes_received=traffic.received,
                    sent_bytes_per_second=_rate(before and before.sent, traffic.sent, before, traffic),
                    received_bytes_per_second=_rate(before and before.received, traffic.received, before, traffic),
                )
            )
        return networks


def _rate(count_before: int | None, count: int, before: Traffic | None, after: Traffic) -> float | None:
    """None if nothing is known of before, or the counter began again."""
    if before is None or count_before is None or count < count_before or after.at <= before.at:
        return None
    return round((count - count_before) / (after.at - before.at), 1)


def _mounts() -> dict[str, str]:
    """The mount points of the file systems that are on a device, or on another machine, and their devices."""
    mounts: dict[str, str] = {}
    devices: set[str] = set()
    for partition in psutil.disk_partitions(all=False):
        # What is mounted twice is one disk. The first is where the system has mounted it.
        if partition.fstype not in PSEUDO_FILE_SYSTEMS and partition.device not in devices:
            mounts[partition.mountpoint] = partition.device
            devices.add(partition.device)
    return {"/": mounts.pop("/", ""), **mounts}  # in a container it is no device's


def _cpu_temperature() -> float | None:
    sensors = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    readings = next((sensors[name] for name in CPU_SENSORS if sensors.get(name)), None)
    return round(readings[0].current, 1) if readings else None


def _usage_percent(size: Size) -> float | None:
    """As df: what is reserved for root is neither used nor available."""
    if size.used is None or size.available is None:
        return None
    return percent(size.used, size.used + size.available)


def _disk(mount_point: str, device: str, size: Size) -> Disk:
    return Disk(
        mount_point=mount_point,
        device=device,
        used_gb=in_units(size.used, GB),
        total_gb=in_units(size.total, GB),
        available_gb=in_units(size.available, GB),
        usage_percent=_usage_percent(size),
        error=size.error,
    )


def _file_system(mount_point: str, size: Size) -> FileSystem:
    return FileSystem(
        mount_point=mount_point,
        used_gb=in_units(size.used, GB),
        total_gb=in_units(size.total, GB),
        usage_percent=_usage_percent(size),
        error=size.error,
    )
