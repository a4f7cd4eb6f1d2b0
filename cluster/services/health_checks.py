"""How services are: each is asked now and then, and what came of it is kept for a while."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from time import perf_counter

from sqlalchemy import BigInteger, Boolean, Float, ForeignKey, Integer, String, Text, delete, func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster import events
from cluster.db import Base, Database, after_commit, delete_rows, now
from cluster.secrets import SealBroken
from cluster.services import store as service_store
from cluster.services.catalog import all_connectors
from cluster.services.connector import Connector
from cluster.services.errors import NotThere, ServiceError, Unreachable
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from cluster.services.store import Service
from cluster.settings import get_settings

AT_ONCE = 8
VERSION_MAX = 100


class ServiceCheck(Base):
    __tablename__ = "service_checks"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(index=True)  # when the service was asked
    healthy: Mapped[bool] = mapped_column(Boolean)
    latency_ms: Mapped[float | None] = mapped_column(Float)  # None: nobody has answered
    version: Mapped[str | None] = mapped_column(String(VERSION_MAX))
    error_code: Mapped[str | None] = mapped_column(String(100))
    error: Mapped[str | None] = mapped_column(Text)


async def check(database: Database, service: Service) -> ServiceCheck:
    """Ask a service how it is, whatever its circuit says, and keep the answer."""
    outcome = ServiceCheck(service_id=service.id, at=now(), healthy=False)
    began = perf_counter()
    try:
        async with service_store.connected(database, service, even_if_open=True) as client:
            outcome.version = (await version_of(client))[:VERSION_MAX]
        outcome.healthy = True
        outcome.latency_ms = _milliseconds_since(began)
    except ServiceError as error:
        outcome.latency_ms = None if isinstance(error, Unreachable) else _milliseconds_since(began)
        reason = await explained(error, service_store.connection_of(service))
        outcome.error_code, outcome.error = reason.code, reason.message
    except SealBroken as error:
        outcome.error_code, outcome.error = error.code, error.message
    async with database.transaction() as session:
        await service_store.get(session, service.id)  # it may have been deleted meanwhile
        was_healthy = await session.scalar(
            select(ServiceCheck.healthy)
            .where(ServiceCheck.service_id == service.id)
            .order_by(ServiceCheck.id.desc())
            .limit(1)
        )
        session.add(outcome)
        if outcome.healthy is not (was_healthy is None or was_healthy):
            after_commit(session, lambda: events.publish([_news(service, outcome)]))
    return outcome


async def check_all(database: Database, services: Sequence[Service]) -> list[ServiceCheck | None]:
    """Ask many at the same time, but not all of a large home at once. None: a service was deleted meanwhile."""
    room = asyncio.Semaphore(AT_ONCE)

    async def one(service: Service) -> ServiceCheck | None:
        with suppress(service_store.ServiceNotFound):
            async with room:
                return await check(database, service)

    return await asyncio.gather(*map(one, services))


async def version_of(client: Client) -> str:
    """Ask whether the service works."""
    try:
        return await client.connection.connector.health(client)
    except NotThere as error:
        raise client.wrong() from error


async def explained(error: ServiceError, connection: Connection) -> ServiceError:
    """What has gone wrong; or, if the page at this address is another service's, that."""
    if isinstance(error, Unreachable):
        return error
    visitor = Client(replace(connection, key=None))
    async with visitor.open():
        other = _other_service(await visitor.front_page() or "", connection.connector)
    return visitor.wrong(other) if other else error


async def last_checks(session: AsyncSession) -> dict[int, ServiceCheck]:
    """The last check of each service that was checked as it is connected now."""
    newest = (
        select(func.max(ServiceCheck.id))
        .where(ServiceCheck.service_id == Service.id)
        .correlate(Service)
        .scalar_subquery()
    )
    found = await session.scalars(
        select(ServiceCheck)
        .join(Service, ServiceCheck.service_id == Service.id)
        .where(ServiceCheck.id == newest, ServiceCheck.at >= Service.connected_as_of)
    )
    return {outcome.service_id: outcome for outcome in found}


async def remove_old(database: Database) -> int:
    """Forget checks that are older than `services.history_days`."""
    async with database.transaction() as session:
        oldest = now() - timedelta(days=get_settings().services.history_days)
        return await delete_rows(session, delete(ServiceCheck).where(ServiceCheck.at < oldest))


def _news(service: Service, outcome: ServiceCheck) -> events.Message:
    """What the room `system` hears of a service that has gone away, or is back."""
    kind = "service.healthy" if outcome.healthy else "service.unhealthy"
    data = {"service": service.name, "type": service.type, "error": outcome.error}
    return events.message(["system"], kind, data, outcome.at)


def _milliseconds_since(began: float) -> float:
    return round((perf_counter() - began) * 1000, 1)


def _other_service(title: str, wanted: Connector) -> str | None:
    """Which service shows a page of this title, if it is not the one that should be there."""
    named = [
        (place, connector)
        for connector in all_connectors().values()
        for name in (connector.title, *connector.aliases)
        if (place := title.casefold().find(name.casefold())) >= 0
    ]
    if not named or any(connector is wanted for _, connector in named):
        return None
    return min(named, key=lambda found: found[0])[1].title
