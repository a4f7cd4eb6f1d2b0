"""The services of this installation: those that people have added, and those that the settings declare.

A key is sealed in the table, and sent to its service only. Declared services are rows like all others, written when
Forgearr starts, so code that uses a service need not distinguish them.
"""

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from urllib.parse import urlsplit

from sqlalchemy import BigInteger, Boolean, Integer, String, Text, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, advisory_lock, now
from cluster.errors import Conflict, ForgearrError, NotFound, SettingsError, UnprocessableRequest
from cluster.sealing import SealedSecret, contains_secrets
from cluster.secrets import SealBroken, seal, unseal
from cluster.services import circuit_breaker
from cluster.services.catalog import connectors_by_name, find_connector
from cluster.services.circuit_breaker import Circuit
from cluster.services.connector import Connector
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from cluster.services.http.urls import validate_url
from cluster.settings import DeclaredService

CONNECTION_FIELDS = {"type", "url", "api_key", "verify_tls"}


class ServiceNotFound(NotFound):
    """There is no such service."""

    code = "SERVICE_NOT_FOUND"


class ServiceNameTaken(Conflict):
    """There is already a service of this name."""

    code = "SERVICE_NAME_TAKEN"


class ServiceDeclared(Conflict):
    """The settings declare this service (services.declared): change it there."""

    code = "SERVICE_DECLARED"


class InvalidServiceKey(UnprocessableRequest):
    """The key has characters that are not possible in a key of this service."""

    code = "INVALID_SERVICE_KEY"


class KeyMustBeResent(UnprocessableRequest):
    """The key was given for another address or type: send api_key again with the new one."""

    code = "SERVICE_KEY_WANTED"


class MisleadingName(UnprocessableRequest):
    """A service cannot have the name of another type of service."""

    code = "MISLEADING_SERVICE_NAME"


class Service(Base):
    __tablename__ = "services"
    # Ids are never reused: records about a deleted service must not become another's.
    __table_args__ = {"sqlite_autoincrement": True}  # noqa: RUF012

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    type: Mapped[str] = mapped_column(String(40))
    url: Mapped[str] = mapped_column(Text)
    api_key: Mapped[str | None] = mapped_column(Text)  # sealed
    verify_tls: Mapped[bool] = mapped_column(Boolean, default=True)
    enabled: Mapped[bool] = mapped_column(Boolean, default=True)
    declared: Mapped[bool] = mapped_column(Boolean, default=False)  # in the settings, and only changed there
    connected_as_of: Mapped[datetime] = mapped_column(default=now)  # last change of its type, address or key
    created_by: Mapped[str] = mapped_column(String(200))
    created_at: Mapped[datetime] = mapped_column(default=now)
    updated_at: Mapped[datetime] = mapped_column(default=now, onupdate=now)

    @property
    def connector(self) -> Connector:
        return find_connector(self.type)


def _describe_key(service: Service) -> SealedSecret:
    by = "forgearr up, from services.declared" if service.declared else f"PUT /api/services/{service.id} with api_key"
    return SealedSecret(f"the key of the service '{service.name}'", by)


contains_secrets(Service.api_key, _describe_key)


async def list_services(session: AsyncSession) -> Sequence[Service]:
    """Return all services, by id. There are a few dozen, so there are no pages."""
    return (await session.scalars(select(Service).order_by(Service.id))).all()


async def get(session: AsyncSession, service_id: int, *, lock: bool = False) -> Service:
    service = await session.get(Service, service_id, with_for_update=lock)
    if service is None:
        raise ServiceNotFound(f"There is no service {service_id}.")
    return service


async def find(session: AsyncSession, name: str) -> Service | None:
    """Return the service with this handle or name. None: the name is a type, and there is no service of it."""
    services = await list_services(session)
    by_name = {service.name.casefold(): service for service in services}
    connector = connectors_by_name().get(name.casefold())
    service = handles(services).get(connector.type if connector else name) or by_name.get(name.casefold())
    if service is None and connector is None:
        raise ServiceNotFound(f"There is no service named '{name}'.")
    return service


def handles(services: Sequence[Service]) -> dict[str, Service]:
    """Return the services by handle: the type for one service of each type, the name for the others.

    The type is the handle of an enabled service before a disabled one, of one with the type as its name, of the oldest.
    """
    first: dict[str, Service] = {}
    for service in sorted(services, key=lambda item: (not item.enabled, item.name.casefold() != item.type, item.id)):
        first.setdefault(service.type, service)
    return {service.type if first[service.type] is service else service.name: service for service in services}


async def create(session: AsyncSession, values: Mapping[str, Any], by: str) -> Service:
    """Add a service. `values` are its columns, with the key in plain text."""
    await advisory_lock(session, Service.__tablename__)
    service = Service(created_by=by)
    await _set_columns(session, service, values)
    session.add(service)
    await session.flush()  # for its id
    session.add(Circuit(service_id=service.id))
    await session.flush()
    return service


async def change(session: AsyncSession, service: Service, values: Mapping[str, Any]) -> None:
    """Set columns of a service. A declared service cannot be changed."""
    if service.declared:
        raise ServiceDeclared
    await advisory_lock(session, Service.__tablename__)
    await _update(session, service, values)


async def delete(session: AsyncSession, service: Service) -> None:
    """Delete a service and the records about it. A declared service cannot be deleted."""
    if service.declared:
        raise ServiceDeclared
    await session.delete(service)


async def declare(session: AsyncSession, declarations: Sequence[DeclaredService]) -> None:
    """Make the declared services in the table equal to those in the settings."""
    await advisory_lock(session, Service.__tablename__)
    existing = {service.name.casefold(): service for service in await list_services(session)}
    for declaration in declarations:
        key = None if declaration.api_key is None else declaration.api_key.get_secret_value()
        values = {**declaration.model_dump(), "api_key": key, "declared": True}
        try:
            service = existing.pop(declaration.name.casefold(), None)
            if service is None:
                await create(session, values, "settings")
            else:
                await _update(session, service, values)
        except ForgearrError as error:
            raise SettingsError(
                f"Setting 'services.declared' has an invalid service '{declaration.name}': {error.message}"
            ) from None
    for service in existing.values():
        if service.declared:
            await session.delete(service)
    await session.flush()


@asynccontextmanager
async def open_client(
    database: Database,
    service: Service,
    *,
    clock: Callable[[], datetime] = now,
    ignore_circuit: bool = False,
) -> AsyncGenerator[Client]:
    """Open a client of a service, unless its circuit is open. The results of its calls are recorded in the circuit.

    Use one for each request or step of a job: the circuit is read once before, and written once after.
    """
    connection = connection_of(service)
    if not ignore_circuit:
        await circuit_breaker.before_call(database, service.id, service.name, clock())
    client = Client(connection)
    try:
        async with client.open():
            yield client
    finally:
        await circuit_breaker.after_call(database, service.id, client, clock())


def connection_of(service: Service) -> Connection:
    key = None if service.api_key is None else unseal(service.api_key)
    return Connection(service.name, service.connector, service.url, key, service.verify_tls)


async def _update(session: AsyncSession, service: Service, values: Mapping[str, Any]) -> None:
    connected_before = service.connected_as_of
    with session.no_autoflush:  # invalid values must not be written
        await _set_columns(session, service, values)
    if service.connected_as_of != connected_before:
        await circuit_breaker.reset(session, service.id)
    await session.flush()


async def _set_columns(session: AsyncSession, service: Service, values: Mapping[str, Any]) -> None:
    """Set these columns, and check them."""
    previous = {name: getattr(service, name) for name in CONNECTION_FIELDS}
    for name, value in values.items():
        if name != "api_key":
            setattr(service, name, value)
    service.type, service.url = service.connector.type, validate_url(service.url)
    await _check_name(session, service)
    if "api_key" in values:
        _set_key(service, values["api_key"])
    elif previous["api_key"] and (previous["type"], _origin(previous["url"])) != (service.type, _origin(service.url)):
        raise KeyMustBeResent
    if previous != {name: getattr(service, name) for name in CONNECTION_FIELDS}:
        service.connected_as_of = now()


async def _check_name(session: AsyncSession, service: Service) -> None:
    others = [other for other in await list_services(session) if other is not service]
    if service.name.casefold() in {other.name.casefold() for other in others}:
        raise ServiceNameTaken(f"There is already a service named '{service.name}'.")
    namesake = connectors_by_name().get(service.name.casefold())
    if namesake not in {None, service.connector}:
        raise MisleadingName(f"A service of type {service.type} cannot be named '{service.name}'.")


def _set_key(service: Service, key: str | None) -> None:
    connector = service.connector
    if key is not None and not connector.takes_key:
        raise InvalidServiceKey(f"{connector.title} takes no API key.")
    if key is not None and connector.key_scheme and not (key.isascii() and key.isprintable()):
        raise InvalidServiceKey(f"The key has characters that are not possible in an API key of {connector.title}.")
    if key is None or key != _current_key(service):
        service.api_key = None if key is None else seal(key)


def _current_key(service: Service) -> str | None:
    try:
        return service.api_key and unseal(service.api_key)
    except SealBroken:
        return None


def _origin(url: str) -> tuple[str, str]:
    parts = urlsplit(url)
    return parts.scheme, parts.netloc.casefold()
