"""What Proxmox and Qdrant know of a server, answered as their API documents say."""

from typing import Any

import pytest

from cluster.services.capabilities.server_values import ServerValues
from cluster.services.catalog import find_connector
from cluster.services.errors import ServiceError, Unauthorized, Unreachable
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from tests.support.services.fake_services import FAKE_SERVICES, KEY
from tests.support.services.stub_server import StubRequest, StubResponse, json_response, stub_server

GIB = 1024**3
VERSION = {"data": {"version": "8.4.1", "release": "8.4", "repoid": "2a5fa54a8503f96d"}}
NODES = [
    {"type": "node", "node": "pve1", "status": "online", "cpu": 0.5, "maxcpu": 4, "mem": 8 * GIB, "maxmem": 16 * GIB,
     "uptime": 7200, "id": "node/pve1"},
    {"type": "node", "node": "pve2", "status": "online", "cpu": 0.0, "maxcpu": 12, "mem": 8 * GIB, "maxmem": 16 * GIB,
     "uptime": 3600, "id": "node/pve2"},
]  # fmt: skip
GUESTS = [
    {"type": "qemu", "vmid": 100, "name": "media", "node": "pve1", "status": "running", "cpu": 0.153, "maxcpu": 4,
     "mem": 4 * GIB, "maxmem": 8 * GIB, "disk": 0, "maxdisk": 32 * GIB, "uptime": 86400, "template": 0},
    {"type": "qemu", "vmid": 101, "name": "no-agent", "node": "pve2", "status": "running", "cpu": 0.0, "maxcpu": 2,
     "mem": GIB, "maxmem": 2 * GIB, "disk": 0, "maxdisk": 8 * GIB, "uptime": 60, "template": 0},
    {"type": "lxc", "vmid": 102, "name": "dns", "node": "pve1", "status": "stopped", "cpu": 0, "maxcpu": 1,
     "mem": 0, "maxmem": GIB, "disk": 2 * GIB, "maxdisk": 4 * GIB, "uptime": 0, "template": 0},
    {"type": "qemu", "vmid": 900, "name": "template", "node": "pve1", "status": "stopped", "maxdisk": GIB,
     "template": 1},
]  # fmt: skip
STORAGES = [{"type": "storage", "storage": "local", "node": "pve1", "disk": 30 * GIB, "maxdisk": 60 * GIB}]
GUEST_DISKS = [
    {"name": "sda1", "mountpoint": "/", "used-bytes": 5 * GIB, "total-bytes": 30 * GIB},
    {"name": "sda2", "mountpoint": "/boot", "used-bytes": GIB, "total-bytes": 2 * GIB},
]
NO_AGENT = StubResponse(b'{"data":null,"message":"No QEMU guest agent configured"}', 500)


@pytest.fixture(autouse=True)
def settings(home: object) -> None:
    """A client needs the setting of its timeout."""


class Proxmox:
    def __init__(self, resources: list[dict[str, Any]]) -> None:
        self.resources = resources

    def __call__(self, request: StubRequest) -> StubResponse:
        replies = {
            "/api2/json/cluster/resources": json_response({"data": self.resources}),
            "/api2/json/nodes/pve1/qemu/100/agent/get-fsinfo": json_response({"data": {"result": GUEST_DISKS}}),
            "/api2/json/version": json_response(VERSION),
        }
        assert request.headers["authorization"] == f"PVEAPIToken={KEY}"
        return replies.get(request.path, NO_AGENT)


async def read(kind: str, url: str, key: str | None = KEY) -> tuple[ServerValues, Client]:
    connector = find_connector(kind)
    assert connector.server_values
    async with Client(Connection("Ours", connector, url, key)).open() as client:
        return await connector.server_values(client), client


async def test_proxmox_knows_its_host_and_its_guests() -> None:
    async with stub_server(Proxmox([*NODES, *GUESTS, *STORAGES])) as server:
        values, client = await read("proxmox", server.url)
    host, guests = values.proxmox_host, values.vms
    assert host
    assert guests
    assert (host.cpu_usage, host.memory_usage, host.storage_usage) == (12.5, 50.0, 50.0)
    assert (host.uptime_hours, host.vm_count) == (1.0, 3)
    media, no_agent, dns = guests
    assert (media.vmid, media.name, media.status, media.cpu_usage) == (100, "media", "running", 15.3)
    assert (media.memory_used_gb, media.memory_total_gb, media.memory_usage_percent) == (4, 8, 50.0)
    assert (media.disk_usage_gb, media.uptime_seconds) == (6, 86400)
    assert no_agent.disk_usage_gb is None
    assert (dns.disk_usage_gb, dns.status) == (2, "stopped")
    assert client.failures == 0, "a guest without an agent is no failure of Proxmox"


async def test_a_token_that_may_see_nothing_is_told() -> None:
    async with stub_server(Proxmox([])) as server:
        with pytest.raises(Unauthorized, match=r"may see nothing.*PVEAuditor"):
            await read("proxmox", server.url)


@pytest.mark.parametrize(("status", "error"), [(401, Unauthorized), (595, ServiceError), (503, Unreachable)])
async def test_a_proxmox_that_refuses_is_an_error(status: int, error: type[ServiceError]) -> None:
    async with stub_server(lambda request: StubResponse(b"{}", status)) as server:
        with pytest.raises(error):
            await read("proxmox", server.url)


async def test_qdrant_knows_its_collections() -> None:
    def qdrant(request: StubRequest) -> StubResponse:
        results: dict[str, Any] = {
            "/collections": {"collections": [{"name": "films"}, {"name": "a b/c"}]},
            "/collections/films": {"status": "green", "points_count": 1_000_000},
            "/collections/a%20b%2Fc": {"status": "green", "points_count": 250_000},
            "/telemetry": {"id": "1", "memory": {"resident_bytes": 512 * 1024**2}},
        }
        if request.path in results:
            return json_response({"result": results[request.path], "status": "ok", "time": 0.001})
        return FAKE_SERVICES["qdrant"](request)

    async with stub_server(qdrant) as server:
        values, _ = await read("qdrant", server.url)
    assert values.qdrant
    assert values.qdrant.model_dump() == {
        "status": "running",
        "collections": 2,
        "total_points": 1_250_000,
        "disk_usage_gb": None,
        "memory_usage_mb": 512,
        "version": "1.15.4",
    }
