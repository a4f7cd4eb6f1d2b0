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

Part = TypeVar("Part")


class NothingConnected(Unavailable):
    """No service that does this is connected."""

    code = "NO_SUCH_SERVICE_CONNECTED"


class CannotDoThis(InvalidRequest):
    """The service is of a type that does not do this."""

    code = "SERVICE_CANNOT"


@asynccontextmanager
async def connected_to(
    database: Database, part: Callable[[Connector], Part | None], does: str, word: str | None = None
) -> AsyncGenerator[tuple[Client, Part]]:
    """A client of the service whose connector has this part, such as `downloads`, and the part."""
    async with database.reading() as session:
        service = await choose(session, part, does, word)
    found = part(service.connector)
    assert found is not None  # else it would not have been chosen
    async with service_store.connected(database, service) as client:
        yield client, found


async def choose(
    session: AsyncSession, can: Callable[[Connector], object], does: str, word: str | None = None
) -> Service:
    """The enabled service that `can`, which is what `does` says in words ("keeps a library").

    `word` names it, by its name or type; without one, it is the first that a type stands for."""
    if word is not None:
        return await _named(session, can, does, word)
    fitting = [service for service in await service_store.every(session) if service.enabled and can(service.connector)]
    if not fitting:
        raise NothingConnected(f"No service is connected that {does}. {_how_to_connect(can)}")
    handles = service_store.handles(fitting)
    return next(service for service in fitting if handles.get(service.type) is service)


async def _named(session: AsyncSession, can: Callable[[Connector], object], does: str, word: str) -> Service:
    service = await service_store.find(session, word)
    if service is None or not service.enabled:
        reason = "is disabled" if service else "is not connected"
        raise NothingConnected(f"Service '{word}' {reason}. {_how_to_connect(can)}")
    if not can(service.connector):
        raise CannotDoThis(f"{service.name} is no service that {does}: {service.connector.title} does not.")
    return service


def _how_to_connect(can: Callable[[Connector], object]) -> str:
    titles = [connector.title for connector in all_connectors().values() if can(connector)]
    return f"An administrator connects one with POST /api/services: {' or '.join(titles)}."
