"""The sources of servers: this machine, and connected services that watch machines or are a part of them."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import partial

from cluster.db import get_database
from cluster.servers.machine import Machine
from cluster.services.capabilities.server_values import ServerValues
from cluster.services.selection import open_client_for
from cluster.settings import DeclaredServer, ServerSettings

DEFAULT_SERVER = "ai_server"
THIS_MACHINE = "this_machine"
SERVICE_SECONDS = 10.0
"""How often a service is asked at most. Each call is also recorded in its circuit breaker."""


@dataclass(frozen=True)
class Source:
    read: Callable[[], Awaitable[ServerValues]]
    period_seconds: float
    close: Callable[[], Awaitable[None]] | None = None  # ends what it keeps open between two readings


Sources = Mapping[str, Mapping[str, Source]]
"""By the name of the server, and the name of the source."""


def configured_sources(settings: ServerSettings) -> Sources:
    declared = settings.declared or {DEFAULT_SERVER: DeclaredServer(this_machine=True)}
    return {name: _sources(server, settings.period_seconds) for name, server in declared.items()}


def _sources(server: DeclaredServer, period_seconds: float) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    if server.this_machine:
        machine = Machine(server.file_systems)
        sources[THIS_MACHINE] = Source(machine.read, period_seconds, machine.close)
    for service in server.services:
        sources[service] = Source(partial(_read_service, service), max(SERVICE_SECONDS, period_seconds))
    return sources


async def _read_service(name: str) -> ServerValues:
    database = get_database()
    description = "knows something of a server"
    async with open_client_for(database, lambda connector: connector.server_values, description, name) as opened:
        client, read_values = opened
        return await read_values(client)
