"""Which service is meant: one that can do what is wanted, whatever its name and its type."""

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
    """No service that does this is connected."""

    code = "NO_SUCH_SERVICE_CONNECTED"


class UnsupportedByService(InvalidRequest):
    """The service is of a type that does not do this."""

    code = "SERVICE_CANNOT"


@asynccontextmanager
async def open_client_for(
    database: Database,
    get_capability: Callable[[Connector], Capability | None],
    description: str,
    service_name: str | None = None,
) -> AsyncGenerator[tuple[Client, Capability]]:
    """A client of the service whose connector has this part, such as `downloads`, and the part."""
    async with database.read_transaction() as session:
        service = await choose_service(session, get_capability, description, service_name)
    capability = get_capability(service.connector)
    assert capability is not None  # else it would not have been chosen
    async with service_store.open_client(database, service) as client:
        yield client, capability


async def choose_service(
    session: AsyncSession, supports: Callable[[Connector], object], description: str, service_name: str | None = None
) -> Service:
    """The enabled service that `can`, which is what `does` says in words ("keeps a library").

    `word` names it, by its name or type; without one, it is the first that a type stands for."""
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
            f"{service.name} is no service that {description}: {service.connector.title} does not."
        )
    return service


def _how_to_connect(supports: Callable[[Connector], object]) -> str:
    titles = [connector.title for connector in all_connectors().values() if supports(connector)]
    return f"An administrator connects one with POST /api/services: {' or '.join(titles)}."
