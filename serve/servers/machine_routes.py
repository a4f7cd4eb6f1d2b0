"""The routes of the three documented servers: /api/ai-server, /api/app-server and /api/storage-server."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel

from cluster.errors import NotFound
from cluster.servers.states import ServerState, ServerStatus, SourceState
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
from serve.security.callers import CurrentCaller
from serve.servers.routes import find_server
from serve.servers.views import ServerView, server_view

ReadServer = Callable[[Request], Awaitable[ServerState]]


class NoSuchVirtualMachine(NotFound):
    """Proxmox has no such virtual machine, or the token may not see it."""

    code = "VIRTUAL_MACHINE_NOT_FOUND"


class NoSuchFileSystem(NotFound):
    """The settings of the server name no such file system."""

    code = "FILE_SYSTEM_NOT_FOUND"


class WithStatus(BaseModel):
    server_status: ServerStatus


class CpuView(WithStatus):
    cpu: Cpu | None


class MemoryView(WithStatus):
    memory: Memory | None


class DisksView(WithStatus):
    disks: list[Disk]


class NetworkView(WithStatus):
    network: list[Network]


class ServerHealth(WithStatus):
    sources: dict[str, SourceState]


class GpuView(WithStatus):
    gpu: Gpu | None
    gpus: list[Gpu]


class ProxmoxView(WithStatus):
    proxmox_host: ProxmoxHost | None


class VirtualMachinesView(WithStatus):
    vms: list[VirtualMachine]
    vm_count: int
    running_vms: int


class FileSystemsView(WithStatus):
    filesystems: list[FileSystem]
    total_filesystems: int
    total_used_gb: float | None
    total_capacity_gb: float | None


class QdrantView(WithStatus):
    qdrant: VectorDatabase | None


def _router(path: str, name: str, title: str) -> APIRouter:
    """The routes that all three servers have."""
    router = APIRouter(prefix=f"/api/{path}")
    read = _reader(name)

    @router.get("/", summary=f"Show {title}")
    async def show(request: Request, caller: CurrentCaller) -> ServerView:
        """Get all that is known of the server."""
        return server_view(await read(request))

    @router.get("/cpu", summary=f"Show the processors of {title}")
    async def show_cpu(request: Request, caller: CurrentCaller) -> CpuView:
        """Get the load of the processors."""
        return _view(CpuView, await read(request))

    @router.get("/memory", summary=f"Show the memory of {title}")
    async def show_memory(request: Request, caller: CurrentCaller) -> MemoryView:
        """Get the use of the memory."""
        return _view(MemoryView, await read(request))

    @router.get("/storage", summary=f"Show the disks of {title}")
    async def show_storage(request: Request, caller: CurrentCaller) -> DisksView:
        """Get the use of the disks."""
        return _view(DisksView, await read(request))

    @router.get("/network", summary=f"Show the networks of {title}")
    async def show_network(request: Request, caller: CurrentCaller) -> NetworkView:
        """Get the traffic of the network interfaces."""
        return _view(NetworkView, await read(request))

    @router.get("/health", summary=f"Show the health of {title}")
    async def show_health(request: Request, caller: CurrentCaller) -> ServerHealth:
        """Get the status of the server and of each of its sources."""
        state = await read(request)
        return ServerHealth(server_status=state.server_status, sources=state.sources)

    return router


def _reader(name: str) -> ReadServer:
    async def read(request: Request) -> ServerState:
        return find_server(await request.app.state.servers.current(), name)

    return read


def _view(view: Any, state: ServerState) -> Any:
    """A response with these fields of the server's values."""
    return view.model_validate(server_view(state), from_attributes=True)


ai_server = _router("ai-server", "ai_server", "the AI server")
app_server = _router("app-server", "app_server", "the app server")
storage_server = _router("storage-server", "storage_server", "the storage server")

_read_ai_server = _reader("ai_server")
_read_app_server = _reader("app_server")
_read_storage_server = _reader("storage_server")


@ai_server.get("/gpu")
async def show_gpu(request: Request, caller: CurrentCaller) -> GpuView:
    """Get the load of the GPUs. `gpu` is the first of them."""
    return _view(GpuView, await _read_ai_server(request))


@app_server.get("/proxmox")
async def show_proxmox(request: Request, caller: CurrentCaller) -> ProxmoxView:
    """Get the load of the Proxmox host, or of all nodes of its cluster."""
    return _view(ProxmoxView, await _read_app_server(request))


@app_server.get("/vms")
async def list_virtual_machines(request: Request, caller: CurrentCaller) -> VirtualMachinesView:
    """List the virtual machines and containers."""
    state = await _read_app_server(request)
    machines = state.values.vms or []
    return VirtualMachinesView(
        server_status=state.server_status,
        vms=machines,
        vm_count=len(machines),
        running_vms=sum(machine.status == "running" for machine in machines),
    )


@app_server.get("/vms/{vm_id}")
async def show_virtual_machine(
    request: Request, caller: CurrentCaller, vm_id: Annotated[int, Path(ge=0, le=999_999_999)]
) -> VirtualMachine:
    """Get a virtual machine by its id."""
    state = await _read_app_server(request)
    for machine in state.values.vms or []:
        if machine.vmid == vm_id:
            return machine
    raise NoSuchVirtualMachine(f"There is no virtual machine {vm_id}.")


@storage_server.get("/filesystems")
async def list_file_systems(request: Request, caller: CurrentCaller) -> FileSystemsView:
    """List the file systems that the settings of the server name."""
    state = await _read_storage_server(request)
    systems = state.values.filesystems or []
    return FileSystemsView(
        server_status=state.server_status,
        filesystems=systems,
        total_filesystems=len(systems),
        total_used_gb=_total([system.used_gb for system in systems]),
        total_capacity_gb=_total([system.total_gb for system in systems]),
    )


@storage_server.get("/filesystems/{mount_point:path}")
async def show_file_system(
    request: Request,
    caller: CurrentCaller,
    mount_point: Annotated[str, Path(max_length=4096, description="The mount point, with / as %2F or as it is.")],
) -> FileSystem:
    """Get a file system by its mount point."""
    state = await _read_storage_server(request)
    # A proxy before us may have decoded %2F, and then merged it with the slash before it.
    path = "/" + mount_point.lstrip("/")
    for system in state.values.filesystems or []:
        if system.mount_point == path:
            return system
    raise NoSuchFileSystem(f"There is no file system {path} in the settings of the storage server.")


@storage_server.get("/qdrant")
async def show_qdrant(request: Request, caller: CurrentCaller) -> QdrantView:
    """Get the size of the vector database."""
    return _view(QdrantView, await _read_storage_server(request))


def _total(sizes: list[float | None]) -> float | None:
    """Null if one of them is unknown: a sum without it would be wrong."""
    known = [size for size in sizes if size is not None]
    return round(sum(known), 2) if len(known) == len(sizes) else None
