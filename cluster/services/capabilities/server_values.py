"""The values of a server: what a machine, or a service that watches machines, knows of it.

What is not known is None, never zero: an unknown number that looks like a number hides an outage. GB are 1024³ bytes,
and MB 1024².
"""

from collections.abc import Sequence

from pydantic import BaseModel, Field

GB = 1024**3
MB = 1024**2


class Cpu(BaseModel):
    usage_percent: float | None = Field(description="Since the measurement before.")
    cores: int | None
    temperature: float | None = Field(default=None, description="In °C.")
    load_average: list[float] | None = Field(default=None, description="Of 1, 5 and 15 minutes.")


class Memory(BaseModel):
    used_gb: float | None
    total_gb: float | None
    usage_percent: float | None
    available_gb: float | None
    cached_gb: float | None = None


class Gpu(BaseModel):
    name: str
    usage_percent: float | None = None
    memory_used_mb: float | None = None
    memory_total_mb: float | None = None
    memory_usage_percent: float | None = None
    temperature: float | None = Field(default=None, description="In °C.")
    power_draw_w: float | None = None
    fan_speed_percent: float | None = None
    unknown: dict[str, str] = Field(
        default_factory=dict, description="Why the fields that are null are unknown: reasons by field."
    )


class Disk(BaseModel):
    mount_point: str
    device: str
    used_gb: float | None
    total_gb: float | None
    available_gb: float | None
    usage_percent: float | None
    error: str | None = Field(default=None, description="Why the numbers are null.")


class Network(BaseModel):
    interface: str
    is_up: bool | None
    bytes_sent: int
    bytes_received: int
    sent_bytes_per_second: float | None = None
    received_bytes_per_second: float | None = None


class FileSystem(BaseModel):
    mount_point: str
    used_gb: float | None
    total_gb: float | None
    usage_percent: float | None
    file_count: int | None = Field(default=None, description="Null: its files have not been counted.")
    avg_file_size_mb: float | None = None
    largest_file_mb: float | None = None
    error: str | None = Field(default=None, description="Why the numbers are null.")


class ProxmoxHost(BaseModel):
    cpu_usage: float | None = Field(description="In percent, of all its nodes.")
    memory_usage: float | None
    storage_usage: float | None
    uptime_hours: float | None = Field(description="Of the node that was started last.")
    vm_count: int


class VirtualMachine(BaseModel):
    vmid: int
    name: str | None
    status: str
    cpu_usage: float | None
    memory_used_gb: float | None
    memory_total_gb: float | None
    memory_usage_percent: float | None
    disk_usage_gb: float | None = Field(description="Null: only a guest agent knows it, and there is none.")
    uptime_seconds: int | None


class VectorDatabase(BaseModel):
    status: str
    collections: int
    total_points: int | None
    disk_usage_gb: float | None
    memory_usage_mb: float | None
    version: str | None


class ServerValues(BaseModel):
    """What one source knows of a server. Several sources complete each other."""

    cpu: Cpu | None = None
    memory: Memory | None = None
    gpus: list[Gpu] = Field(default_factory=list[Gpu])
    disks: list[Disk] = Field(default_factory=list[Disk])
    network: list[Network] = Field(default_factory=list[Network])
    uptime_seconds: float | None = None
    proxmox_host: ProxmoxHost | None = None
    vms: list[VirtualMachine] | None = None
    filesystems: list[FileSystem] | None = None
    qdrant: VectorDatabase | None = None


def percent(part: float | None, whole: float | None) -> float | None:
    return None if part is None or not whole else round(100 * part / whole, 1)


def in_units(count: float | None, unit: int) -> float | None:
    return None if count is None else round(count / unit, 2)


def sum_known(counts: Sequence[int | None]) -> int | None:
    """The sum, unless a part of it is unknown."""
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(counts) else None
