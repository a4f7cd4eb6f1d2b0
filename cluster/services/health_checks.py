"""Health checks of services: call each service, store the results, and report changes of its health."""

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
from cluster.services.errors import NotFoundInService, ServiceError, Unreachable
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from cluster.services.store import Service
from cluster.settings import get_settings

MAX_CONCURRENCY = 8
MAX_VERSION_LENGTH = 100


class ServiceCheck(Base):
    __tablename__ = "service_checks"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"), index=True)
    at: Mapped[datetime] = mapped_column(index=True)  # when the service was called
    healthy: Mapped[bool] = mapped_column(Boolean)
    latency_ms: Mapped[float | None] = mapped_column(Float)  # None: no response
    version: Mapped[str | None] = mapped_column(String(MAX_VERSION_LENGTH))
    error_code: Mapped[str | None] = mapped_column(String(100))
    error: Mapped[str | None] = mapped_column(Text)


async def check(database: Database, service: Service) -> ServiceCheck:
    """Check a service, also if its circuit is open, and store the result."""
    service_check = ServiceCheck(service_id=service.id, at=now(), healthy=False)
    started = perf_counter()
    try:
        async with service_store.open_client(database, service, ignore_circuit=True) as client:
            service_check.version = (await get_version(client, service.connector))[:MAX_VERSION_LENGTH]
        service_check.healthy = True
        service_check.latency_ms = _milliseconds_since(started)
    except ServiceError as error:
        service_check.latency_ms = None if isinstance(error, Unreachable) else _milliseconds_since(started)
        reason = await diagnose(error, service_store.connection_of(service), service.connector)
        service_check.error_code, service_check.error = reason.code, reason.message
    except SealBroken as error:
        service_check.error_code, service_check.error = error.code, error.message
    async with database.transaction() as session:
        await service_store.get(session, service.id)  # it may have been deleted meanwhile
        was_healthy = await session.scalar(
            select(ServiceCheck.healthy)
            .where(ServiceCheck.service_id == service.id)
            .order_by(ServiceCheck.id.desc())
            .limit(1)
        )
        session.add(service_check)
        if service_check.healthy is not (was_healthy is None or was_healthy):
            after_commit(session, lambda: events.publish([_health_event(service, service_check)]))
    return service_check


async def check_all(database: Database, services: Sequence[Service]) -> list[ServiceCheck | None]:
    """Check services, MAX_CONCURRENCY at the same time. None: the service was deleted meanwhile."""
    semaphore = asyncio.Semaphore(MAX_CONCURRENCY)

    async def check_one(service: Service) -> ServiceCheck | None:
        with suppress(service_store.ServiceNotFound):
            async with semaphore:
                return await check(database, service)

    return await asyncio.gather(*map(check_one, services))


async def get_version(client: Client, connector: Connector) -> str:
    """Check that the service works, and return its version."""
    try:
        return await connector.health(client)
    except NotFoundInService as error:
        raise client.wrong_service() from error


async def diagnose(error: ServiceError, connection: Connection, connector: Connector) -> ServiceError:
    """Return the reason of a failed check: the error, or that another service has its page at this address."""
    if isinstance(error, Unreachable):
        return error
    anonymous_client = Client(replace(connection, key=None))
    async with anonymous_client.open():
        other_title = _other_service(await anonymous_client.root_page_title() or "", connector)
    return anonymous_client.wrong_service(other_title) if other_title else error


async def last_checks(session: AsyncSession) -> dict[int, ServiceCheck]:
    """Return the last check of each service that was made since its address and key last changed."""
    newest_id = (
        select(func.max(ServiceCheck.id))
        .where(ServiceCheck.service_id == Service.id)
        .correlate(Service)
        .scalar_subquery()
    )
    checks = await session.scalars(
        select(ServiceCheck)
        .join(Service, ServiceCheck.service_id == Service.id)
        .where(ServiceCheck.id == newest_id, ServiceCheck.at >= Service.connected_as_of)
    )
    return {service_check.service_id: service_check for service_check in checks}


async def remove_old(database: Database) -> int:
    """Delete checks that are older than `services.history_days`, and return their number."""
    async with database.transaction() as session:
        oldest = now() - timedelta(days=get_settings().services.history_days)
        return await delete_rows(session, delete(ServiceCheck).where(ServiceCheck.at < oldest))


def _health_event(service: Service, service_check: ServiceCheck) -> events.Message:
    """Build the message for the room `system` when a service becomes unhealthy, or healthy again."""
    kind = "service.healthy" if service_check.healthy else "service.unhealthy"
    data = {"service": service.name, "type": service.type, "error": service_check.error}
    return events.build_message(["system"], kind, data, service_check.at)


def _milliseconds_since(started: float) -> float:
    return round((perf_counter() - started) * 1000, 1)


def _other_service(title: str, expected: Connector) -> str | None:
    """Return the title of the service that has a page of this title. None: unknown, or the expected service."""
    matches = [
        (position, connector)
        for connector in all_connectors().values()
        for name in (connector.title, *connector.aliases)
        if (position := title.casefold().find(name.casefold())) >= 0
    ]
    if not matches or any(connector is expected for _, connector in matches):
        return None
    return min(matches, key=lambda match: match[0])[1].title
