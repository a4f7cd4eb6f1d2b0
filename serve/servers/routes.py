"""The routes /api/servers, /api/metrics/prometheus, /api/system/metrics and /api/health."""

from typing import Annotated, Literal

from fastapi import APIRouter, Path, Request
from pydantic import BaseModel, Field

from cluster.db import get_database, now
from cluster.errors import NotFound, Unavailable
from cluster.servers.sources import THIS_MACHINE
from cluster.servers.states import ServerState, Snapshot
from cluster.times import UtcTime
from serve.http.marks import access, rate_limit
from serve.security.callers import CurrentCaller
from serve.servers.metrics import plain_lines
from serve.servers.views import Overview, ServerView, Summary, overview, server_view, summary
from serve.services import health as services_health

router = APIRouter(prefix="/api")

ServiceState = Literal["healthy", "unhealthy", "not_configured"]


class ServerNotConfigured(NotFound):
    """There is no such server in the settings (servers.declared)."""

    code = "SERVER_NOT_CONFIGURED"


class PlainMetrics(BaseModel):
    metrics: list[str] = Field(description="A name and a value each. What is not known is left out.")
    timestamp: UtcTime


class SystemMetrics(BaseModel):
    """Of the machine that Forgearr runs on, and of the connected services."""

    cpu_percent: float | None
    memory_percent: float | None
    disk_percent: float | None = Field(description="Of the fullest disk.")
    services_healthy: int
    services_total: int


class ApiServices(BaseModel):
    api: ServiceState
    prometheus: ServiceState = Field(description="The connected service of this type.")
    websocket: ServiceState = Field(description="Whether the monitor answers, which /ws/metrics needs.")


class ApiHealth(BaseModel):
    status: Literal["healthy", "degraded"]
    timestamp: UtcTime
    services: ApiServices
    version: str


@router.get("/servers/overview")
async def show_overview(request: Request, caller: CurrentCaller) -> Overview:
    """Get all that is known of all servers."""
    return overview(await request.app.state.servers.current())


@router.get("/servers/summary")
async def show_summary(request: Request, caller: CurrentCaller) -> Summary:
    """Get the status and the load of all servers."""
    return summary(await request.app.state.servers.current())


@router.get("/servers/{name}")
async def show_server(
    request: Request, caller: CurrentCaller, name: Annotated[str, Path(max_length=60, examples=["ai_server"])]
) -> ServerView:
    """Get all that is known of a server, whatever its name is."""
    return server_view(find_server(await request.app.state.servers.current(), name))


@router.get("/metrics/prometheus")
async def show_plain_metrics(request: Request, caller: CurrentCaller) -> PlainMetrics:
    """Get the numbers of all servers as lines of text. Prometheus itself reads /metrics."""
    snapshot: Snapshot = await request.app.state.servers.current()
    return PlainMetrics(metrics=plain_lines(snapshot), timestamp=now())


@router.get("/system/metrics")
async def show_system_metrics(request: Request, caller: CurrentCaller) -> SystemMetrics:
    """Get the load of the machine that Forgearr runs on, and the number of services that work."""
    snapshot: Snapshot = await request.app.state.servers.current()
    machine = next((server for server in snapshot.servers.values() if THIS_MACHINE in server.sources), None)
    async with get_database().read_transaction() as session:
        services = await services_health.health_by_service(session)
    disks = machine.values.disks if machine else []
    return SystemMetrics(
        cpu_percent=machine.values.cpu.usage_percent if machine and machine.values.cpu else None,
        memory_percent=machine.values.memory.usage_percent if machine and machine.values.memory else None,
        disk_percent=max((disk.usage_percent for disk in disks if disk.usage_percent is not None), default=None),
        services_healthy=sum(service.healthy is True for service in services.values()),
        services_total=len(services),
    )


@router.get("/health")
@access("public")
@rate_limit("health")
async def show_api_health(request: Request) -> ApiHealth:
    """Get the health of the API of servers. /health has that of all of Forgearr."""
    try:
        await request.app.state.servers.current()
    except Unavailable:
        websocket: ServiceState = "unhealthy"
    else:
        websocket = "healthy"
    async with get_database().read_transaction() as session:
        prometheus = (await services_health.health_by_service(session)).get("prometheus")
    state: ServiceState = "not_configured"
    if prometheus is not None:
        state = "healthy" if prometheus.healthy else "unhealthy"
    return ApiHealth(
        status="degraded" if "unhealthy" in (websocket, state) else "healthy",
        timestamp=now(),
        services=ApiServices(api="healthy", prometheus=state, websocket=websocket),
        version=request.app.version,
    )


def find_server(snapshot: Snapshot, name: str) -> ServerState:
    if name not in snapshot.servers:
        raise ServerNotConfigured(f"There is no server '{name}' in the settings (servers.declared).")
    return snapshot.servers[name]
