"""The state of a server: the values of its sources, merged, and how each source is doing."""

from collections.abc import Mapping
from datetime import datetime
from typing import Literal, NamedTuple

from pydantic import BaseModel, Field

from cluster.services.capabilities.server_values import ServerValues
from cluster.times import UtcTime

STALE_PERIODS = 3

SourceStatus = Literal["ok", "stale", "error", "pending"]
ServerStatusName = Literal["online", "offline", "warning", "error"]


class SourceState(BaseModel):
    status: SourceStatus = Field(
        description="ok: its values are of now. stale: they are older than three of its periods. error: it fails now. "
        "pending: it has not answered yet."
    )
    age_s: float | None = Field(description="Seconds since it was read. Null: it has never answered.")
    error: str | None = Field(description="Why it was not read the last time.")


class ServerStatus(BaseModel):
    status: ServerStatusName = Field(
        description="online: all its sources answer. warning: some do. offline: none does. error: none ever has."
    )
    last_updated: UtcTime | None = Field(description="When the newest of its values was read. Null: never.")
    uptime_seconds: float | None = None
    response_time_ms: float | None = Field(default=None, description="Of its slowest source.")


class ServerState(BaseModel):
    server_status: ServerStatus
    values: ServerValues
    sources: dict[str, SourceState]


class Snapshot(BaseModel):
    """All servers at one moment."""

    version: int = Field(description="Grows with each change.")
    servers: dict[str, ServerState]


class Reading(NamedTuple):
    """The last answer of a source. Its times are of the monotonic clock: a clock that is set changes no age."""

    values: ServerValues
    read_at: float
    wall_time: datetime
    seconds: float


class SourceReading(NamedTuple):
    period_seconds: float
    reading: Reading | None = None
    error: str | None = None

    def state(self, now: float) -> SourceState:
        age = None if self.reading is None else max(now - self.reading.read_at, 0.0)
        return SourceState(status=self._status(age), age_s=None if age is None else round(age, 1), error=self.error)

    def _status(self, age: float | None) -> SourceStatus:
        if self.error is not None:
            return "error"
        if age is None:
            return "pending"
        return "stale" if age > STALE_PERIODS * self.period_seconds else "ok"

    def is_fresh(self, now: float) -> bool:
        return self.reading is not None and now - self.reading.read_at <= STALE_PERIODS * self.period_seconds


def server_state(sources: Mapping[str, SourceReading], now: float) -> ServerState:
    """Merge the sources of a server. Where two know the same value, the first of them in the settings counts."""
    values = ServerValues()
    for source in reversed(list(sources.values())):
        if source.reading:
            known = {
                name: getattr(source.reading.values, name)
                for name in ServerValues.model_fields
                if getattr(source.reading.values, name) not in (None, [])
            }
            values = values.model_copy(update=known)
    readings = [source.reading for source in sources.values() if source.reading]
    return ServerState(
        server_status=ServerStatus(
            status=_status(sources, now),
            last_updated=max((reading.wall_time for reading in readings), default=None),
            uptime_seconds=values.uptime_seconds,
            response_time_ms=round(1000 * max(reading.seconds for reading in readings), 1) if readings else None,
        ),
        values=values,
        sources={name: source.state(now) for name, source in sources.items()},
    )


def _status(sources: Mapping[str, SourceReading], now: float) -> ServerStatusName:
    fresh = [source for source in sources.values() if source.is_fresh(now)]
    if not fresh:
        return "offline" if any(source.reading for source in sources.values()) else "error"
    has_problem = len(fresh) < len(sources) or any(source.error for source in sources.values())
    return "warning" if has_problem else "online"
