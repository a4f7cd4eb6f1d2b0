"""Which connected service a door speaks to: the one that does what is wanted, or of several the one that is named."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Annotated, TypeVar

from fastapi import Query

from cluster.db import get_database
from cluster.services.connector import Connector
from cluster.services.http.client import Client
from cluster.services.selection import connected_to

Part = TypeVar("Part")
ServiceWord = Annotated[
    str | None, Query(alias="service", max_length=100, description="Name of the service, if there are several.")
]


def connected(
    part: Callable[[Connector], Part | None], does: str, word: str | None
) -> AbstractAsyncContextManager[tuple[Client, Part]]:
    return connected_to(get_database(), part, does, word)
