"""The responses of servers, as documented: bare, and with null for what is not known."""

from datetime import datetime
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from cluster.db import now
from cluster.servers.states import ServerState, ServerStatus, ServerStatusName, Snapshot, SourceState
from cluster.services.capabilities.server_values import (
    Cpu,
    Disk,
    FileSystem,
    Gpu,
    Memory,
    Network,
    ProxmoxHost,
    VectorDatabase,
    VirtualMachine,
)
from cluster.times import UtcTime

View = TypeVar("View")

DOCUMENTED_SERVERS = ("ai_server", "app_server", "storage_server")


class ServerView(BaseModel):
    """All that is known of a server. What its sources do not know is null."""

    server_status: ServerStatus
    cpu: Cpu | None
    memory: Memory | None
    gpu: Gpu | None = Field(description="The first of gpus.")
    gpus: list[Gpu]
    disks: list[Disk]
    network: list[Network]
    proxmox_host: ProxmoxHost | None
    vms: list[VirtualMachine] | None
    filesystems: list[FileSystem] | None
    qdrant: VectorDatabase | None
    sources: dict[str, SourceState] = Field(description="By name: this_machine, or a connected service.")


class SummaryCounts(BaseModel):
    total_servers: int = Field(description="How many are configured.")
    online_servers: int = Field(description="Those that are online, or have the status warning.")
    alerts_count: int = Field(description="Servers that are not online, or have a source that fails.")
    last_updated: UtcTime


class Overview(SummaryCounts):
    """All servers by name. The three documented ones are always there; null: not configured."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, ServerView]  # pyright: ignore[reportIncompatibleVariableOverride]

    ai_server: ServerView | None
    app_server: ServerView | None
    storage_server: ServerView | None


class ServerSummary(BaseModel):
    status: ServerStatusName
    cpu_usage: float | None
    memory_usage: float | None
    gpu_usage: float | None
    response_time_ms: float | None


class Summary(BaseModel):
    summary: SummaryCounts
    servers: dict[str, ServerSummary | None]


def server_view(state: ServerState) -> ServerView:
    values = state.values
    return ServerView(
        server_status=state.server_status,
        cpu=values.cpu,
        memory=values.memory,
        gpu=values.gpus[0] if values.gpus else None,
        gpus=values.gpus,
        disks=values.disks,
        network=values.network,
        proxmox_host=values.proxmox_host,
        vms=values.vms,
        filesystems=values.filesystems,
        qdrant=values.qdrant,
        sources=state.sources,
    )


def overview(snapshot: Snapshot) -> Overview:
    views = {name: server_view(state) for name, state in snapshot.servers.items()}
    return Overview(**_with_documented(views), **counts(snapshot).model_dump())


def summary(snapshot: Snapshot) -> Summary:
    rows = {name: _summary(state) for name, state in snapshot.servers.items()}
    return Summary(summary=counts(snapshot), servers=_with_documented(rows))


def counts(snapshot: Snapshot) -> SummaryCounts:
    states = [server.server_status.status for server in snapshot.servers.values()]
    return SummaryCounts(
        total_servers=len(states),
        online_servers=sum(status in ("online", "warning") for status in states),
        alerts_count=sum(status != "online" for status in states),
        last_updated=_last_updated(snapshot),
    )


def _last_updated(snapshot: Snapshot) -> datetime:
    times = [server.server_status.last_updated for server in snapshot.servers.values()]
    return max((time for time in times if time is not None), default=now())


def _summary(state: ServerState) -> ServerSummary:
    values = state.values
    return ServerSummary(
        status=state.server_status.status,
        cpu_usage=values.cpu and values.cpu.usage_percent,
        memory_usage=values.memory and values.memory.usage_percent,
        gpu_usage=values.gpus[0].usage_percent if values.gpus else None,
        response_time_ms=state.server_status.response_time_ms,
    )


def _with_documented(rows: dict[str, View]) -> dict[str, View | None]:
    return dict.fromkeys(DOCUMENTED_SERVERS) | rows
