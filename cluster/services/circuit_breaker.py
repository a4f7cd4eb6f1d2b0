"""A circuit breaker for each service: after repeated failures, the service is not called for a while.

    closed     → open        after `services.breaker_threshold` failures in a row
    open       → half_open   after `services.breaker_seconds`, for the next caller
    half_open  → closed      when the calls of that caller succeed
    half_open  → open        when they fail too

A circuit is a row, so all replicas and workers share it. While it is closed, it costs one read before the calls and one
write after them.
"""

from datetime import datetime, timedelta
from math import ceil
from typing import Literal

from sqlalchemy import ForeignKey, Integer, String, Text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Mapped, mapped_column

from cluster.db import Base, Database, now
from cluster.services.errors import CircuitOpen
from cluster.services.http.client import Client
from cluster.settings import get_settings

CircuitState = Literal["closed", "open", "half_open"]


class Circuit(Base):
    __tablename__ = "service_circuits"

    service_id: Mapped[int] = mapped_column(ForeignKey("services.id", ondelete="CASCADE"), primary_key=True)
    state: Mapped[CircuitState] = mapped_column(String(10), default="closed")
    changed_at: Mapped[datetime] = mapped_column(default=now)  # when it opened, or the last trial began
    failure_count: Mapped[int] = mapped_column(Integer, default=0)  # in a row
    success_count: Mapped[int] = mapped_column(Integer, default=0)  # ever
    last_failure: Mapped[str | None] = mapped_column(Text)


async def before_call(database: Database, service_id: int, name: str, at: datetime) -> None:
    """Return, or raise CircuitOpen. When the time of an open circuit is up, the next caller is its trial."""
    async with database.read_transaction() as session:
        circuit = await session.get(Circuit, service_id)
    if circuit is None or circuit.state == "closed":
        return
    _raise_if_open(circuit, name, at)
    async with database.transaction() as session:
        circuit = await session.get(Circuit, service_id, with_for_update=True)
        if circuit is None or circuit.state == "closed":
            return
        _raise_if_open(circuit, name, at)  # another caller may have become the trial meanwhile
        # If a trial never reports its result, the next one is allowed after the same time.
        circuit.state, circuit.changed_at = "half_open", at


async def after_call(database: Database, service_id: int, client: Client, at: datetime) -> None:
    """Record the results of a client's calls."""
    if not client.successes and not client.failures:
        return
    async with database.transaction() as session:
        circuit = await session.get(Circuit, service_id, with_for_update=True)
        if circuit is None:
            return  # the service was deleted meanwhile
        circuit.success_count += client.successes
        if not client.failures:
            circuit.state, circuit.failure_count, circuit.last_failure = "closed", 0, None
            return
        circuit.failure_count = client.failures + (0 if client.successes else circuit.failure_count)
        circuit.last_failure = client.last_failure and client.last_failure.message
        if circuit.state == "half_open" or (
            circuit.state == "closed" and circuit.failure_count >= get_settings().services.breaker_threshold
        ):
            circuit.state, circuit.changed_at = "open", at


async def reset(session: AsyncSession, service_id: int) -> None:
    """Close the circuit, because the service has another address or key now."""
    circuit = await session.get_one(Circuit, service_id, with_for_update=True)
    circuit.state, circuit.failure_count, circuit.last_failure = "closed", 0, None


def state_of(circuit: Circuit, at: datetime) -> CircuitState:
    """Return the state of a circuit. When the time of an open one is up, it is half open: the next call may pass."""
    return "half_open" if circuit.state == "open" and not _seconds_left(circuit, at) else circuit.state


def _raise_if_open(circuit: Circuit, name: str, at: datetime) -> None:
    seconds = _seconds_left(circuit, at)
    if seconds:
        reason = f": {circuit.last_failure}" if circuit.last_failure else "."
        message = f"{name} has failed {circuit.failure_count} times in a row, and is not called for now{reason}"
        raise CircuitOpen(message, seconds)


def _seconds_left(circuit: Circuit, at: datetime) -> int:
    until = circuit.changed_at + timedelta(seconds=get_settings().services.breaker_seconds)
    return max(0, ceil((until - at) / timedelta(seconds=1)))
