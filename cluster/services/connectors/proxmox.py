"""The connector of Proxmox VE, which runs virtual machines. Its certificate is usually self-signed (`verify_tls`)."""

import asyncio
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel, Field

from cluster.services.capabilities.server_values import (
    GB,
    ProxmoxHost,
    ServerValues,
    VirtualMachine,
    in_units,
    percent,
    sum_known,
)
from cluster.services.connector import Connector
from cluster.services.errors import ServiceError, Unauthorized
from cluster.services.http.api_key import ApiKeyScheme
from cluster.services.http.client import Client
from cluster.tools import Arguments, Tool


async def health(client: Client) -> str:
    version_info = client.require_keys(await client.get("/api2/json/version"), "version", "repoid")
    return str(version_info["version"])


def unwrap(response: Any) -> Any:
    return response["data"] if isinstance(response, dict) and "data" in response else response


class Machine(BaseModel):
    vmid: int
    name: str | None = None
    node: str
    type: str
    status: str
    cpu: float | None = Field(default=None, description="Share of its processors in use, from 0 to 1.")
    maxcpu: float | None = None
    mem: int | None = None
    maxmem: int | None = None
    uptime: int | None = None


async def get_machines(client: Client, _: Arguments) -> list[Machine]:
    return client.parse(list[Machine], await client.get("/api2/json/cluster/resources", type="vm"))


class Resource(BaseModel):
    """An entry of /cluster/resources. Memory and disks are in bytes, `cpu` is from 0 to 1."""

    type: str
    node: str | None = None
    vmid: int | None = None
    name: str | None = None
    status: str | None = None
    cpu: float | None = None
    maxcpu: float | None = None
    mem: int | None = None
    maxmem: int | None = None
    disk: int | None = None
    maxdisk: int | None = None
    uptime: int | None = None
    template: bool = False


class GuestFileSystem(BaseModel):
    used_bytes: int | None = Field(default=None, alias="used-bytes")


class GuestFileSystems(BaseModel):
    result: list[GuestFileSystem]


async def server_values(client: Client) -> ServerValues:
    resources = client.parse(list[Resource], await client.get("/api2/json/cluster/resources"))
    nodes = [resource for resource in resources if resource.type == "node"]
    if not nodes:
        # A token of its own privileges is answered with 200 and nothing if it has none.
        raise Unauthorized("The token may see nothing: give it the role PVEAuditor on /, for the token itself.")
    guests = [guest for guest in resources if guest.type in {"qemu", "lxc"} and not guest.template]
    disks = await asyncio.gather(*(_used_bytes(client, guest) for guest in guests))
    await health(client)  # last, so that guests without an agent, which are errors, do not open the circuit breaker
    storages = [storage for storage in resources if storage.type == "storage" and storage.maxdisk]
    return ServerValues(
        proxmox_host=ProxmoxHost(
            cpu_usage=_cpu_percent(nodes),
            memory_usage=_share([node.mem for node in nodes], [node.maxmem for node in nodes]),
            storage_usage=_share([entry.disk for entry in storages], [entry.maxdisk for entry in storages]),
            uptime_hours=_uptime_hours(nodes),
            vm_count=len(guests),
        ),
        vms=[_virtual_machine(guest, disk) for guest, disk in zip(guests, disks, strict=True)],
    )


async def _used_bytes(client: Client, guest: Resource) -> int | None:
    """Of a virtual machine, Proxmox itself reports 0: only an agent in it knows what its file systems hold."""
    if guest.type == "lxc":
        return guest.disk
    if guest.status != "running":
        return None
    try:
        response = await client.get(f"/api2/json/nodes/{guest.node}/qemu/{guest.vmid}/agent/get-fsinfo")
    except ServiceError:
        return None  # it has no agent, or the token may not ask it
    systems = client.parse(GuestFileSystems, response).result
    known = [system.used_bytes for system in systems if system.used_bytes is not None]
    return sum(known) if known else None


def _virtual_machine(guest: Resource, used_bytes: int | None) -> VirtualMachine:
    assert guest.vmid is not None, "Proxmox gives one to each guest"
    return VirtualMachine(
        vmid=guest.vmid,
        name=guest.name,
        status=guest.status or "unknown",
        cpu_usage=None if guest.cpu is None else round(100 * guest.cpu, 1),
        memory_used_gb=in_units(guest.mem, GB),
        memory_total_gb=in_units(guest.maxmem, GB),
        memory_usage_percent=percent(guest.mem, guest.maxmem),
        disk_usage_gb=in_units(used_bytes, GB),
        uptime_seconds=guest.uptime,
    )


def _cpu_percent(nodes: Sequence[Resource]) -> float | None:
    """Of all processors of all nodes that tell."""
    known = [(node.cpu, node.maxcpu) for node in nodes if node.cpu is not None and node.maxcpu]
    return percent(sum(share * count for share, count in known), sum(count for _, count in known)) if known else None


def _share(parts: Sequence[int | None], wholes: Sequence[int | None]) -> float | None:
    return percent(sum_known(parts), sum_known(wholes)) if parts else None


def _uptime_hours(nodes: Sequence[Resource]) -> float | None:
    uptimes = [node.uptime for node in nodes if node.uptime is not None]
    return round(min(uptimes) / 3600, 1) if uptimes else None


CONNECTOR = Connector(
    type="proxmox",
    title="Proxmox",
    aliases=("pve",),
    capabilities=frozenset({"health", "machines"}),
    health=health,
    key_scheme=ApiKeyScheme(header="Authorization", template="PVEAPIToken={}"),
    key_help="Datacenter, Permissions, API Tokens: USER@REALM!TOKENID=SECRET.",
    unwrap=unwrap,
    server_values=server_values,
    tools=(Tool("get_machines", "List virtual machines and containers", Arguments, get_machines),),
)
