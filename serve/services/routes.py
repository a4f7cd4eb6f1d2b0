"""The routes /api/services: the outside services, such as Sonarr or Plex, to which Forgearr connects."""

from typing import Annotated

from fastapi import APIRouter, Path
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr, field_validator
from pydantic.json_schema import SkipJsonSchema
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from cluster import audit_log
from cluster.db import get_database, now
from cluster.services import health_checks
from cluster.services import store as service_store
from cluster.services.catalog import all_connectors
from cluster.services.circuit_breaker import Circuit, CircuitState, state_of
from cluster.services.connector import Capability
from cluster.services.health_checks import ServiceCheck
from cluster.services.store import Service
from cluster.times import UtcTime
from pipelines.media.check_services import enqueue_check
from serve.http.pagination import Page, PaginationParams
from serve.security.callers import AdminCaller, CurrentCaller

router = APIRouter(prefix="/api/services")

MAX_ID = 2**63 - 1


def _validate_one_line(text: str) -> str:
    if not text.isprintable() or text != text.strip():
        raise ValueError("must be one line, without spaces around it")
    return text


ServiceId = Annotated[int, Path(ge=1, le=MAX_ID)]
Name = Annotated[str, Field(min_length=1, max_length=100, examples=["Plex"]), AfterValidator(_validate_one_line)]
Type = Annotated[str, Field(min_length=1, max_length=40, description="See /api/services/types.", examples=["plex"])]
Url = Annotated[str, Field(min_length=1, max_length=2000, examples=["http://192.168.1.100:32400"])]
ApiKey = Annotated[SecretStr, Field(min_length=1, max_length=2000, description="The key is never shown.")]


class ServiceTypeView(BaseModel):
    type: str
    title: str
    aliases: list[str] = Field(description="Other names of the type.")
    capabilities: list[Capability]
    takes_key: bool
    needs_key: bool
    key_help: str = Field(description="Where to find the key.")


class ServiceView(BaseModel):
    """A service. Its key is never shown."""

    id: int
    name: str
    type: str
    url: str
    enabled: bool
    is_healthy: bool | None = Field(description="Result of the last check. Null: not checked since its last change.")
    last_check: UtcTime | None
    latency_ms: float | None
    error: str | None
    version: str | None
    has_key: bool
    verify_tls: bool
    declared: bool = Field(description="Whether the settings declare it. Then only they can change it.")
    capabilities: list[Capability]
    circuit_breaker_state: CircuitState
    created_by: str
    created_at: UtcTime
    updated_at: UtcTime


class ServiceRequest(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name
    type: Type
    url: Url
    api_key: ApiKey | None = None
    verify_tls: bool = Field(default=True, description="false for a service with a self-signed certificate.")
    enabled: bool = True


class ServiceChanges(BaseModel):
    """Changes to a service. Fields that are not sent stay unchanged. A new url needs the key again."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: Name | SkipJsonSchema[None] = None
    type: Type | SkipJsonSchema[None] = None
    url: Url | SkipJsonSchema[None] = None
    api_key: ApiKey | None = None
    verify_tls: bool | SkipJsonSchema[None] = None
    enabled: bool | SkipJsonSchema[None] = None

    @field_validator("name", "type", "url", "verify_tls", "enabled", mode="before")
    @classmethod
    def refuse_null(cls, value: object) -> object:
        if value is None:
            raise ValueError("cannot be null")
        return value


class ConnectionTest(BaseModel):
    success: bool
    message: str
    response_time_ms: float | None = Field(description="Null: no response.")
    version: str | None
    error_code: str | None


class CheckView(BaseModel):
    at: UtcTime
    healthy: bool
    latency_ms: float | None
    version: str | None
    error_code: str | None
    error: str | None


@router.get("")
async def list_services(caller: CurrentCaller) -> list[ServiceView]:
    async with get_database().read_transaction() as session:
        outcomes = await health_checks.last_checks(session)
        circuits = {circuit.service_id: circuit for circuit in await session.scalars(select(Circuit))}
        services = await service_store.list_services(session)
    return [_view(service, outcomes.get(service.id), circuits[service.id]) for service in services]


@router.get("/types")
async def list_service_types(caller: CurrentCaller) -> list[ServiceTypeView]:
    """List the types of service, their capabilities, and where to find their keys."""
    return [
        ServiceTypeView(
            type=connector.type,
            title=connector.title,
            aliases=list(connector.aliases),
            capabilities=sorted(connector.capabilities),
            takes_key=connector.takes_key,
            needs_key=connector.needs_key,
            key_help=connector.key_help,
        )
        for connector in all_connectors().values()
    ]


@router.post("", status_code=201)
async def create_service(body: ServiceRequest, caller: AdminCaller) -> ServiceView:
    """Add a service, and queue its first check."""
    async with get_database().transaction() as session:
        service = await service_store.create(session, _columns(body), caller.name)
        if service.enabled:
            await enqueue_check(session, service.id, caller)
        return await _load_view(session, service)


@router.get("/{service_id}")
async def show_service(service_id: ServiceId, caller: CurrentCaller) -> ServiceView:
    async with get_database().read_transaction() as session:
        return await _load_view(session, await service_store.get(session, service_id))


@router.put("/{service_id}")
async def change_service(service_id: ServiceId, changes: ServiceChanges, caller: AdminCaller) -> ServiceView:
    """Change the fields that are sent. If the connection changes, a check is queued."""
    async with get_database().transaction() as session:
        service = await service_store.get(session, service_id, lock=True)
        previous_state = service.connected_as_of, service.enabled
        await service_store.change(session, service, _columns(changes))
        if service.enabled and (service.connected_as_of, service.enabled) != previous_state:
            await enqueue_check(session, service.id, caller)
        return await _load_view(session, service)


@router.delete("/{service_id}", status_code=204)
async def delete_service(service_id: ServiceId, caller: AdminCaller) -> None:
    """Delete a service and its checks."""
    async with get_database().transaction() as session:
        service = await service_store.get(session, service_id, lock=True)
        await service_store.delete(session, service)
        audit_log.record(session, "service.delete", caller, service.name, type=service.type)


@router.post("/{service_id}/test")
async def test_service(service_id: ServiceId, caller: AdminCaller) -> ConnectionTest:
    """Check a service now, whatever its circuit breaker says."""
    async with get_database().read_transaction() as session:
        service = await service_store.get(session, service_id)
    outcome = await health_checks.check(get_database(), service)
    return ConnectionTest(
        success=outcome.healthy,
        message="Connection successful" if outcome.healthy else str(outcome.error),
        response_time_ms=outcome.latency_ms,
        version=outcome.version,
        error_code=outcome.error_code,
    )


@router.get("/{service_id}/checks")
async def list_checks(service_id: ServiceId, caller: CurrentCaller, paging: PaginationParams) -> Page[CheckView]:
    """List the checks of a service, the newest first."""
    query = select(ServiceCheck).where(ServiceCheck.service_id == service_id)
    async with get_database().read_transaction() as session:
        await service_store.get(session, service_id)
        rows = await paging.read(session, query.order_by(ServiceCheck.id.desc()))
        return paging.page([CheckView.model_validate(row, from_attributes=True) for row in rows.items], rows.total)


def _columns(body: ServiceRequest | ServiceChanges) -> dict[str, object]:
    values = body.model_dump(exclude_unset=isinstance(body, ServiceChanges))
    if body.api_key is not None:
        values["api_key"] = body.api_key.get_secret_value()
    return values


async def _load_view(session: AsyncSession, service: Service) -> ServiceView:
    outcomes = await health_checks.last_checks(session)
    return _view(service, outcomes.get(service.id), await session.get_one(Circuit, service.id))


def _view(service: Service, outcome: ServiceCheck | None, circuit: Circuit) -> ServiceView:
    return ServiceView(
        id=service.id,
        name=service.name,
        type=service.type,
        url=service.url,
        enabled=service.enabled,
        is_healthy=outcome and outcome.healthy,
        last_check=outcome and outcome.at,
        latency_ms=outcome and outcome.latency_ms,
        error=outcome and outcome.error,
        version=outcome and outcome.version,
        has_key=service.api_key is not None,
        verify_tls=service.verify_tls,
        declared=service.declared,
        capabilities=sorted(service.connector.capabilities),
        circuit_breaker_state=state_of(circuit, now()),
        created_by=service.created_by,
        created_at=service.created_at,
        updated_at=service.updated_at,
    )
