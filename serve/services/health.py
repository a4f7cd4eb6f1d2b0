"""The routes /health/{service}: the health of an outside service and its circuit breaker. /health has all of them."""

from datetime import timedelta
from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import get_database, now
from cluster.errors import Unavailable
from cluster.services import health_checks
from cluster.services import store as service_store
from cluster.services.circuit_breaker import Circuit, CircuitState, state_of
from cluster.services.health_checks import ServiceCheck
from cluster.services.store import ServiceNotFound
from cluster.settings import get_settings
from cluster.times import UtcTime
from serve.http.marks import rate_limit
from serve.security.callers import CurrentCaller

router = APIRouter(prefix="/health")

MAX_CHECK_AGE = timedelta(seconds=30)
"""An older check is not returned: the service is checked again."""

ServiceName = Annotated[str, Path(max_length=100, description="Type or name of the service.", examples=["sonarr"])]


class ServiceNotConnected(Unavailable):
    """The service is not connected."""


class ServiceHealth(BaseModel):
    healthy: bool | None = Field(description="Null: not checked yet.")
    latency_ms: float | None
    error: str | None
    last_check: UtcTime | None
    circuit_breaker_state: CircuitState


class CircuitView(BaseModel):
    state: CircuitState
    failure_count: int = Field(description="Failures in a row.")
    success_count: int
    threshold: int = Field(description="Failures in a row that open it.")
    timeout: float = Field(description="Seconds in the state open, before the next attempt.")


@router.get("/{service}")
@rate_limit("health")
async def show_service_health(service: ServiceName, caller: CurrentCaller) -> ServiceHealth:
    """Get the health of a service. If it does not work, the response is 503, with the reason in `details`."""
    database = get_database()
    async with database.read_transaction() as session:
        row = await service_store.find(session, service)
        outcome = (await health_checks.last_checks(session)).get(row.id) if row else None
    if row is None or not row.enabled:
        raise ServiceNotConnected(f"Service '{service}' is not connected")
    if outcome is None or now() - outcome.at > MAX_CHECK_AGE:
        outcome = await health_checks.check(database, row)
    async with database.read_transaction() as session:
        circuit = await session.get(Circuit, row.id)
    if circuit is None:
        raise ServiceNotFound(f"There is no service named '{service}'.")  # deleted since
    health = _health(outcome, circuit)
    if not health.healthy:
        raise ServiceNotConnected(f"Service '{service}' is not connected", details=health.model_dump(mode="json"))
    return health


@router.get("/circuit-breaker/{service}")
@rate_limit("health")
async def show_circuit_breaker(service: ServiceName, caller: CurrentCaller) -> CircuitView:
    """Get the circuit breaker of a service.

    closed: it is called. open: it failed too often and is not called. half_open: the next call is an attempt.
    """
    async with get_database().read_transaction() as session:
        row = await service_store.find(session, service)
        circuit = await session.get(Circuit, row.id) if row else None
    if circuit is None:
        raise ServiceNotFound(f"There is no service of type '{service}'.")
    settings = get_settings().services
    return CircuitView(
        state=state_of(circuit, now()),
        failure_count=circuit.failure_count,
        success_count=circuit.success_count,
        threshold=settings.breaker_threshold,
        timeout=settings.breaker_seconds,
    )


async def health_by_service(session: AsyncSession) -> dict[str, ServiceHealth]:
    """The enabled services by handle, with the results of their last checks. No service is called."""
    services = await service_store.list_services(session)
    outcomes = await health_checks.last_checks(session)
    circuits = {circuit.service_id: circuit for circuit in await session.scalars(select(Circuit))}
    return {
        handle: _health(outcomes.get(service.id), circuits[service.id])
        for handle, service in sorted(service_store.handles(services).items())
        if service.enabled
    }


def _health(outcome: ServiceCheck | None, circuit: Circuit) -> ServiceHealth:
    return ServiceHealth(
        healthy=outcome and outcome.healthy,
        latency_ms=outcome and outcome.latency_ms,
        error=outcome and outcome.error,
        last_check=outcome and outcome.at,
        circuit_breaker_state=state_of(circuit, now()),
    )
