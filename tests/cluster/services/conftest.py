"""Fixtures of the tests of services: rows of services in the database."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from cluster.db import Database
from cluster.services import store as service_store
from cluster.services.store import Service

Add = Callable[..., Awaitable[Service]]


@pytest.fixture
def add(database: Database) -> Add:
    async def add(url: str, type: str = "sonarr", **values: Any) -> Service:  # noqa: A002
        async with database.transaction() as session:
            return await service_store.create(
                session, {"name": f"Our {type}", "type": type, "url": url, **values}, "ada"
            )

    return add
