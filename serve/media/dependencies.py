"""Selects the connected service for a route: the one with the capability, or the one that the request names."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, TypeVar

from fastapi import Query

from cluster.db import get_database
from cluster.services.connector import Connector
from cluster.services.http.client import Client
from cluster.services.selection import open_client_for

Capability = TypeVar("Capability")
ServiceName = Annotated[
    str | None,
    Query(alias="service", max_length=100, description="Name of the service, if more than one has this capability."),
]


def connected_service(
    get_capability: Callable[[Connector], Capability | None], description: str, service_name: str | None
) -> AbstractAsyncContextManager[tuple[Client, Capability]]:
    return open_client_for(get_database(), get_capability, description, service_name)
