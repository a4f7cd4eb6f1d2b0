"""The routes /health and /api/v1/ping, for load balancers and benchmarks. They need no credential."""

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
from cluster.db import DatabaseUnavailable, get_database, now
from cluster.errors import Unavailable
from cluster.services.catalog import all_connectors
from cluster.settings import get_settings
from cluster.times import UtcTime
from serve.http.marks import access, rate_limit
from serve.monitoring.version import VERSION
from serve.security.callers import find_known_caller
from serve.services import health as services_health
from serve.services.health import ServiceHealth

router = APIRouter()

CACHE_SECONDS = 1.0
CHECK_TIMEOUT_SECONDS = 1.0

logger = logging.getLogger(__name__)

_started = time.monotonic()


class Components(BaseModel):
    database: Literal["connected", "disconnected"]
    dispatcher: Literal["running", "unreachable"]
    events: Literal["running", "unreachable"]
    monitor: Literal["running", "unreachable"]


class Health(BaseModel):
    status: Literal["healthy", "degraded", "unhealthy"] = Field(
        description="degraded: a component of Forgearr or an outside service does not work. unhealthy: no outside "
        "service works, or the database is not reachable. Only without the database the status is 503."
    )
    service: str
    version: str
    environment: str
    database: Literal["connected", "disconnected"]
    uptime: int = Field(description="Seconds since this gateway process started.")
    services: dict[str, ServiceHealth] = Field(
        description="Last checks of the enabled outside services, by type; further services of a type by name. Without "
        "a credential they have no numbers and no errors, and those that go by their name are left out."
    )
    ollama_available: bool | None = Field(description="Null: no Ollama server is configured.")
    components: Components
    timestamp: UtcTime


class Pong(BaseModel):
    pong: bool


class HealthCheck:
    """Checks the components at most once a second, and returns the last result in between."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._cached: Health | None = None
        self._cached_until = 0.0

    async def current(self) -> Health:
        async with self._lock:
            if self._cached is None or time.monotonic() >= self._cached_until:
                self._cached = await _check_health()
                self._cached_until = time.monotonic() + CACHE_SECONDS
            return self._cached


@router.get("/health", responses={503: {"model": Health, "description": "The database is not reachable"}})
@access("public")
@rate_limit("health")
async def health(request: Request, response: Response) -> Health:
    """Get the health of Forgearr, its components and the outside services. Details need a credential."""
    result = await request.app.state.health.current()
    if result.database == "disconnected":
        response.status_code = 503
        response.headers["Retry-After"] = str(DatabaseUnavailable.retry_after)
    return result if await _is_known(request) else _without_details(result)


@router.get("/api/v1/ping")
@access("public")
async def ping() -> Pong:
    """Respond at once, without any work."""
    return Pong(pong=True)


async def _is_known(request: Request) -> bool:
    """Whether the caller needs no credential or has a valid one. A database that hangs must not delay the response."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            return await find_known_caller(request) is not None
    except TimeoutError:
        return False


def _without_details(result: Health) -> Health:
    """What a stranger may know. An error may name a host, and so may the name of a service."""
    services = {
        handle: ServiceHealth(
            healthy=service.healthy,
            latency_ms=None,
            error=None,
            last_check=None,
            circuit_breaker_state=service.circuit_breaker_state,
        )
        for handle, service in result.services.items()
        if handle in all_connectors()
    }
    return result.model_copy(update={"services": services})


async def _check_health() -> Health:
    database, services, dispatcher, live_events, monitor, ollama = await asyncio.gather(
        _database_state(),
        _services_health(),
        _actor_state("dispatcher"),
        _actor_state("events"),
        _actor_state("monitor"),
        _is_ollama_available(),
    )
    actors_running = dispatcher == live_events == monitor == "running"
    return Health(
        status="unhealthy" if database == "disconnected" else _overall_status(services, actors_running),
        service="Forgearr",
        version=VERSION,
        environment=get_settings().serve.environment,
        database=database,
        uptime=int(time.monotonic() - _started),
        services=services,
        ollama_available=ollama,
        components=Components(database=database, dispatcher=dispatcher, events=live_events, monitor=monitor),
        timestamp=now(),
    )


def _overall_status(
    services: Mapping[str, ServiceHealth], actors_running: bool
) -> Literal["healthy", "degraded", "unhealthy"]:
    failing = sum(service.healthy is False for service in services.values())
    if failing and failing == len(services):
        return "unhealthy"
    return "healthy" if actors_running and not failing else "degraded"


async def _database_state() -> Literal["connected", "disconnected"]:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS), get_database().read_transaction() as session:
            await session.execute(text("SELECT 1"))
    except (SQLAlchemyError, OSError) as error:
        logger.warning("The database does not respond: %s", error or type(error).__name__)
        return "disconnected"
    return "connected"


async def _services_health() -> dict[str, ServiceHealth]:
    """The last checks of the outside services. No service is called."""
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS), get_database().read_transaction() as session:
            return await services_health.health_by_service(session)
    except (SQLAlchemyError, OSError) as error:
        logger.warning("The state of the services cannot be read: %s", error or type(error).__name__)
        return {}


async def _is_ollama_available() -> bool | None:
    """Whether the configured Ollama server responds; None if there is none."""
    url = get_settings().ollama.url
    if url is None:
        return None
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS), httpx.AsyncClient() as client:
            return (await client.get(f"{url.rstrip('/')}/api/version")).is_success
    except (httpx.HTTPError, httpx.InvalidURL, TimeoutError):
        return False


async def _actor_state(name: str) -> Literal["running", "unreachable"]:
    """Whether a named actor responds to `__ray_ready__`, which every actor has."""
    try:
        actor = await asyncio.to_thread(actors.find_actor, name)
    except Unavailable:
        return "unreachable"
    from ray.exceptions import RayActorError, RaySystemError

    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SECONDS):
            await actor.__ray_ready__.remote()
    except (RayActorError, RaySystemError, TimeoutError) as error:
        actors.forget_actor(name)
        logger.warning("The %s actor does not respond: %s", name, error or type(error).__name__)
        return "unreachable"
    return "running"
