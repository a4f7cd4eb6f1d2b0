"""/health, /metrics and /api/v1/ping: for load balancers, Prometheus and benchmarks. They need no credential."""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Literal

import httpx
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, Field
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError

from cluster import actors
from cluster.db import get_database, now
from cluster.errors import Unavailable
from cluster.settings import get_settings
from cluster.times import UtcTime
from serve.http.errors import ERROR_RESPONSES
from serve.monitoring.version import VERSION
from serve.services import health as services_health
from serve.services.health import ServiceHealth

router = APIRouter(tags=["Monitoring"], responses=ERROR_RESPONSES)

KEPT_SECONDS = 1.0
PATIENCE_SECONDS = 1.0

logger = logging.getLogger(__name__)

_started = time.monotonic()


class Components(BaseModel):
    database: Literal["connected", "disconnected"]
    dispatcher: Literal["running", "unreachable"]
    events: Literal["running", "unreachable"]


class Health(BaseModel):
    status: Literal["healthy", "degraded", "unhealthy"] = Field(
        description="degraded: a part of Forgearr or an outside service does not work; unhealthy: no outside service "
        "does, or there is no database, without which nothing works. Only the latter is a 503."
    )
    service: str
    version: str
    environment: str
    database: Literal["connected", "disconnected"]
    uptime: int = Field(description="Seconds since this gateway process started.")
    services: dict[str, ServiceHealth] = Field(
        description="The enabled outside services, by type, and further ones of a type by name, as last checked."
    )
    ollama_available: bool | None = Field(description="Null: no Ollama is configured.")
    components: Components
    timestamp: UtcTime


class Pong(BaseModel):
    pong: bool


class HealthCheck:
    """Looks at the components at most once a second, however often it is asked."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._known: Health | None = None
        self._known_until = 0.0

    async def current(self) -> Health:
        async with self._lock:
            if self._known is None or time.monotonic() >= self._known_until:
                self._known = await _look()
                self._known_until = time.monotonic() + KEPT_SECONDS
            return self._known


@router.get("/health", responses={503: {"model": Health, "description": "The database is not reachable"}})
async def health(request: Request, response: Response) -> Health:
    """Whether Forgearr works, and which of its parts do."""
    found = await request.app.state.health.current()
    if found.database == "disconnected":
        response.status_code = 503
    return found


@router.get("/api/v1/ping")
async def ping() -> Pong:
    """Does nothing, as fast as it can."""
    return Pong(pong=True)


async def _look() -> Health:
    database, services, dispatcher, live_events, ollama = await asyncio.gather(
        _database(), _services(), _actor("dispatcher"), _actor("events"), _ollama()
    )
    whole = dispatcher == live_events == "running"
    return Health(
        status="unhealthy" if database == "disconnected" else _status(services, whole),
        service="Forgearr",
        version=VERSION,
        environment=get_settings().serve.environment,
        database=database,
        uptime=int(time.monotonic() - _started),
        services=services,
        ollama_available=ollama,
        components=Components(database=database, dispatcher=dispatcher, events=live_events),
        timestamp=now(),
    )


def _status(services: Mapping[str, ServiceHealth], whole: bool) -> Literal["healthy", "degraded", "unhealthy"]:
    failing = sum(service.healthy is False for service in services.values())
    if failing and failing == len(services):
        return "unhealthy"
    return "healthy" if whole and not failing else "degraded"


async def _database() -> Literal["connected", "disconnected"]:
    try:
        async with asyncio.timeout(PATIENCE_SECONDS), get_database().reading() as session:
            await session.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError) as error:
        logger.warning("The database does not answer: %s", error or type(error).__name__)
        return "disconnected"
    return "connected"


async def _services() -> dict[str, ServiceHealth]:
    """What is known of the outside services; nobody is asked for it now."""
    try:
        async with asyncio.timeout(PATIENCE_SECONDS), get_database().reading() as session:
            return await services_health.of_all(session)
    except (SQLAlchemyError, OSError) as error:
        logger.warning("The state of the services cannot be read: %s", error or type(error).__name__)
        return {}


async def _ollama() -> bool | None:
    """Whether the Ollama of the settings answers; None without one."""
    url = get_settings().ollama.url
    if url is None:
        return None
    try:
        async with asyncio.timeout(PATIENCE_SECONDS), httpx.AsyncClient() as client:
            return (await client.get(f"{url.rstrip('/')}/api/version")).is_success
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
        return False


async def _actor(name: str) -> Literal["running", "unreachable"]:
    """Whether a named actor answers a call that Ray gives every actor."""
    try:
        actor = await asyncio.to_thread(actors.find, name)
    except Unavailable:
        return "unreachable"
    from ray.exceptions import RayActorError, RaySystemError

    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await actor.__ray_ready__.remote()
    except (RayActorError, RaySystemError, TimeoutError) as error:
        actors.forget(name)
        logger.warning("The %s actor does not answer: %s", name, error or type(error).__name__)
        return "unreachable"
    return "running"
