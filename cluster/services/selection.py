"""Select a connected service that has a capability, by name, by type, or without either."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import TypeVar

from sqlalchemy.ext.asyncio import AsyncSession

from cluster.db import Database
from cluster.errors import InvalidRequest, Unavailable
from cluster.services import store as service_store
from cluster.services.catalog import all_connectors
from cluster.services.connector import Connector
from cluster.services.http.client import Client
from cluster.services.store import Service

Capability = TypeVar("Capability")


class NoServiceConnected(Unavailable):
    """No connected service can do this."""

    code = "NO_SUCH_SERVICE_CONNECTED"


class UnsupportedByService(InvalidRequest):
    """The service is of a type that cannot do this."""

    code = "SERVICE_CANNOT"


@asynccontextmanager
async def open_client_for(
    database: Database,
    get_capability: Callable[[Connector], Capability | None],
    description: str,
    service_name: str | None = None,
) -> AsyncGenerator[tuple[Client, Capability]]:
    """Open a client of a service whose connector has a capability, such as `downloads`, and yield both."""
    async with database.read_transaction() as session:
        service = await choose_service(session, get_capability, description, service_name)
    capability = get_capability(service.connector)
    assert capability is not None  # else it would not have been chosen
    async with service_store.open_client(database, service) as client:
        yield client, capability


async def choose_service(
    session: AsyncSession, supports: Callable[[Connector], object], description: str, service_name: str | None = None
) -> Service:
    """Return an enabled service whose connector passes `supports`. Errors call it "a service that {description}".

    `service_name` is a name or a type. Without it, the first service is returned that has its type as its handle.
    """
    if service_name is not None:
        return await _find_named(session, supports, description, service_name)
    candidates = [
        service
        for service in await service_store.list_services(session)
        if service.enabled and supports(service.connector)
    ]
    if not candidates:
        raise NoServiceConnected(f"No service is connected that {description}. {_how_to_connect(supports)}")
    handles = service_store.handles(candidates)
    return next(service for service in candidates if handles.get(service.type) is service)


async def _find_named(
    session: AsyncSession, supports: Callable[[Connector], object], description: str, service_name: str
) -> Service:
    service = await service_store.find(session, service_name)
    if service is None or not service.enabled:
        reason = "is disabled" if service else "is not connected"
        raise NoServiceConnected(f"Service '{service_name}' {reason}. {_how_to_connect(supports)}")
    if not supports(service.connector):
        raise UnsupportedByService(
            f"{service.name} is not a service that {description}: its type is {service.connector.title}."
        )
    return service


def _how_to_connect(supports: Callable[[Connector], object]) -> str:
    titles = [connector.title for connector in all_connectors().values() if supports(connector)]
    return f"An administrator can connect one with POST /api/services: {' or '.join(titles)}."
