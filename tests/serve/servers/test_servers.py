"""The routes of servers: the documented fields, what is not configured, and what is not known."""

from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import quote

import pytest

from cluster.errors import Unavailable
from cluster.servers.monitor import ServerMonitor
from cluster.servers.sources import THIS_MACHINE, Source
from cluster.services.capabilities.server_values import (
    Cpu,
    Disk,
    FileSystem,
    Gpu,
    Memory,
    Network,
    ProxmoxHost,
    ServerValues,
    VectorDatabase,
    VirtualMachine,
)
from tests.support.api_client import ApiClient

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

COMMON = ("", "cpu", "memory", "storage", "network", "health")
PATHS = {
    "ai-server": (*COMMON, "gpu"),
    "app-server": (*COMMON, "proxmox", "vms", "vms/100"),
    "storage-server": (*COMMON, "filesystems", "filesystems/%2Fmnt", "qdrant"),
}
MACHINE = ServerValues(
    cpu=Cpu(usage_percent=45.2, cores=16, temperature=65, load_average=[1.2, 1.5, 1.8]),
    memory=Memory(used_gb=28.5, total_gb=64, usage_percent=44.5, available_gb=35.5),
    gpus=[Gpu(name="one", usage_percent=78.3), Gpu(name="two", usage_percent=None)],
    disks=[Disk(mount_point="/", device="/dev/sda1", used_gb=1, total_gb=4, available_gb=3, usage_percent=25.0)],
    network=[Network(interface="eth0", is_up=True, bytes_sent=1, bytes_received=2)],
    uptime_seconds=3600,
)
PROXMOX = ServerValues(
    proxmox_host=ProxmoxHost(cpu_usage=23.1, memory_usage=67.8, storage_usage=45.2, uptime_hours=168, vm_count=2),
    vms=[
        VirtualMachine(
            vmid=number,
            name=f"vm-{number}",
            status=status,
            cpu_usage=15.3,
            memory_used_gb=4.2,
            memory_total_gb=8,
            memory_usage_percent=52.5,
            disk_usage_gb=None,
            uptime_seconds=86400,
        )
        for number, status in ((100, "running"), (101, "stopped"))
    ],
)
MOUNT_POINTS = ["/", "/mnt/ingest", "/mnt/with space", "/mnt/100%", "/mnt/fünf"]
STORAGE = ServerValues(
    filesystems=[
        FileSystem(mount_point=mount_point, used_gb=1250.5, total_gb=2000, usage_percent=62.5)
        for mount_point in MOUNT_POINTS
    ],
    qdrant=VectorDatabase(
        status="running",
        collections=3,
        total_points=1_250_000,
        disk_usage_gb=None,
        memory_usage_mb=512,
        version="1.15.4",
    ),
)


def returning(values: ServerValues) -> Callable[[], Awaitable[ServerValues]]:
    async def read() -> ServerValues:
        return values

    return read


async def fail() -> ServerValues:
    raise Unavailable("The NAS does not answer.")


def configure(api: ApiClient, **servers: dict[str, Callable[[], Awaitable[ServerValues]]]) -> None:
    """Have these sources, instead of those of the settings."""
    sources = {name: {key: Source(read, 1) for key, read in named.items()} for name, named in servers.items()}
    api.app.state.servers._local = ServerMonitor(sources)


def configure_all(api: ApiClient) -> None:
    configure(
        api,
        ai_server={THIS_MACHINE: returning(MACHINE)},
        app_server={"Proxmox": returning(PROXMOX)},
        storage_server={THIS_MACHINE: returning(STORAGE), "NAS": fail},
        attic={"NAS": fail},
    )


async def get(api: ApiClient, path: str) -> Any:
    response = await api.request("ada", "GET", path)
    assert response.status_code == 200, response.text
    return response.json()


async def test_without_settings_this_machine_is_the_ai_server(api: ApiClient) -> None:
    overview = await get(api, "/api/servers/overview")
    assert overview["app_server"] is None
    assert overview["storage_server"] is None
    assert (overview["total_servers"], overview["online_servers"], overview["alerts_count"]) == (1, 1, 0)
    assert overview["ai_server"]["memory"]["total_gb"] > 0
    assert overview["ai_server"]["server_status"]["status"] == "online"
    assert overview["ai_server"]["sources"] == {"this_machine": {"status": "ok", "age_s": 0.0, "error": None}}
    refused = await api.request("ada", "GET", "/api/storage-server/qdrant")
    assert (refused.status_code, refused.json()["error_code"]) == (404, "SERVER_NOT_CONFIGURED")


async def test_the_overview_has_every_server(api: ApiClient) -> None:
    configure_all(api)
    overview = await get(api, "/api/servers/overview")
    assert (overview["total_servers"], overview["online_servers"], overview["alerts_count"]) == (4, 3, 2)
    assert overview["ai_server"]["gpu"]["name"] == "one"
    assert [gpu["name"] for gpu in overview["ai_server"]["gpus"]] == ["one", "two"]
    assert overview["app_server"]["gpu"] is None
    assert overview["app_server"]["disks"] == []
    assert overview["storage_server"]["server_status"]["status"] == "warning"
    assert overview["storage_server"]["sources"]["NAS"]["error"] == "The NAS does not answer."
    assert overview["attic"]["server_status"] == {
        "status": "error",
        "last_updated": None,
        "uptime_seconds": None,
        "response_time_ms": None,
    }
    assert (await get(api, "/api/servers/attic"))["cpu"] is None
    missing = await api.request("ada", "GET", "/api/servers/cellar")
    assert (missing.status_code, missing.json()["error_code"]) == (404, "SERVER_NOT_CONFIGURED")


async def test_the_summary_has_the_documented_fields(api: ApiClient) -> None:
    configure_all(api)
    summary = await get(api, "/api/servers/summary")
    assert summary["summary"].keys() == {"total_servers", "online_servers", "alerts_count", "last_updated"}
    ai_server = summary["servers"]["ai_server"]
    assert ai_server.pop("response_time_ms") >= 0
    assert ai_server == {"status": "online", "cpu_usage": 45.2, "memory_usage": 44.5, "gpu_usage": 78.3}
    assert summary["servers"]["app_server"]["cpu_usage"] is None
    configure(api, ai_server={THIS_MACHINE: returning(MACHINE)})
    api.app.state.servers._cached_until = 0.0
    assert (await get(api, "/api/servers/summary"))["servers"]["app_server"] is None


@pytest.mark.parametrize(("server", "part"), [(server, part) for server, parts in PATHS.items() for part in parts])
async def test_every_part_of_a_server_can_be_read(api: ApiClient, server: str, part: str) -> None:
    configure(api, **{name.replace("-", "_"): {"all": returning(merged())} for name in PATHS})
    content = await get(api, f"/api/{server}/{part}")
    assert "data" not in content
    assert content.get("server_status", {"status": "online"})["status"] == "online"
    anonymous = await api.http.get(f"/api/{server}/{part}")
    assert anonymous.status_code == 401


def merged() -> ServerValues:
    mount = FileSystem(mount_point="/mnt", used_gb=None, total_gb=None, usage_percent=None, error="does not answer")
    return MACHINE.model_copy(
        update={
            "proxmox_host": PROXMOX.proxmox_host,
            "vms": PROXMOX.vms,
            "filesystems": [mount],
            "qdrant": STORAGE.qdrant,
        }
    )


async def test_the_parts_have_the_documented_fields(api: ApiClient) -> None:
    configure_all(api)
    gpu = await get(api, "/api/ai-server/gpu")
    assert (gpu["gpu"]["usage_percent"], len(gpu["gpus"])) == (78.3, 2)
    cpu = await get(api, "/api/ai-server/cpu")
    assert cpu["cpu"] == {"usage_percent": 45.2, "cores": 16, "temperature": 65, "load_average": [1.2, 1.5, 1.8]}
    assert (await get(api, "/api/app-server/proxmox"))["proxmox_host"]["uptime_hours"] == 168
    machines = await get(api, "/api/app-server/vms")
    assert (machines["vm_count"], machines["running_vms"], machines["vms"][0]["name"]) == (2, 1, "vm-100")
    assert (await get(api, "/api/app-server/vms/101"))["status"] == "stopped"
    missing = await api.request("ada", "GET", "/api/app-server/vms/7")
    assert (missing.status_code, missing.json()["error_code"]) == (404, "VIRTUAL_MACHINE_NOT_FOUND")
    systems = await get(api, "/api/storage-server/filesystems")
    assert (systems["total_filesystems"], systems["total_used_gb"], systems["total_capacity_gb"]) == (5, 6252.5, 10000)
    assert (await get(api, "/api/storage-server/qdrant"))["qdrant"]["total_points"] == 1_250_000
    assert (await get(api, "/api/app-server/memory"))["memory"] is None


@pytest.mark.parametrize("mount_point", MOUNT_POINTS)
async def test_a_file_system_is_found_by_its_encoded_mount_point(api: ApiClient, mount_point: str) -> None:
    configure_all(api)
    for spelling in (quote(mount_point, safe=""), quote(mount_point), quote(mount_point.lstrip("/"))):
        if spelling:
            system = await get(api, f"/api/storage-server/filesystems/{spelling}")
            assert system["mount_point"] == mount_point


async def test_an_unknown_file_system_is_404(api: ApiClient) -> None:
    configure_all(api)
    missing = await api.request("ada", "GET", "/api/storage-server/filesystems/%2Fetc%2Fpasswd")
    assert (missing.status_code, missing.json()["error_code"]) == (404, "FILE_SYSTEM_NOT_FOUND")


async def test_a_sum_with_an_unknown_part_is_unknown(api: ApiClient) -> None:
    configure(api, storage_server={"all": returning(merged())})
    systems = await get(api, "/api/storage-server/filesystems")
    assert (systems["total_filesystems"], systems["total_used_gb"]) == (1, None)
    assert systems["filesystems"][0]["error"] == "does not answer"


async def test_plain_lines_leave_out_what_is_not_known(api: ApiClient) -> None:
    configure_all(api)
    assert (await get(api, "/api/metrics/prometheus"))["metrics"] == [
        "ai_server_cpu_usage_percent 45.2",
        "ai_server_memory_usage_percent 44.5",
        "ai_server_gpu_usage_percent 78.3",
        "system_total_servers 4",
        "system_online_servers 3",
    ]


async def test_prometheus_gets_the_same_numbers_with_a_credential_only(api: ApiClient) -> None:
    configure_all(api)
    text = (await api.request("ada", "GET", "/metrics")).text
    for line in (
        'server_cpu_usage_percent{server="ai_server"} 45.2',
        'server_gpu_usage_percent{gpu="0",server="ai_server"} 78.3',
        'server_disk_usage_percent{mount_point="/",server="ai_server"} 25.0',
        'server_up{server="attic"} 0.0',
        'server_up{server="storage_server"} 1.0',
    ):
        assert line in text
    assert 'server_cpu_usage_percent{server="app_server"}' not in text
    assert "server_" not in (await api.http.get("/metrics")).text


async def test_the_load_of_the_system_and_its_services(api: ApiClient) -> None:
    configure_all(api)
    assert await get(api, "/api/system/metrics") == {
        "cpu_percent": 45.2,
        "memory_percent": 44.5,
        "disk_percent": 25.0,
        "services_healthy": 0,
        "services_total": 0,
    }
    configure(api, app_server={"Proxmox": returning(PROXMOX)})
    api.app.state.servers._cached_until = 0.0
    assert (await get(api, "/api/system/metrics"))["cpu_percent"] is None


async def test_the_health_of_the_api_is_public(api: ApiClient) -> None:
    health = (await api.http.get("/api/health")).json()
    assert (health["status"], health["services"]) == (
        "healthy",
        {"api": "healthy", "prometheus": "not_configured", "websocket": "healthy"},
    )
