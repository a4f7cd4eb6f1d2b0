"""What tests of several doors share."""

from collections.abc import AsyncIterator

import pytest

from cluster import identity
from cluster.db import Database
from cluster.settings import get_settings
from serve.app import create_app
from tests.support.api_client import House


@pytest.fixture
async def house(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "false")
    get_settings.cache_clear()
    people: dict[str, identity.User] = {}
    async with database.transaction() as session:
        for name in ("ada", "bob", "admin"):
            people[name] = await identity.add_user(
                session,
                email=f"{name}@example.com",
                username=name,
                password_hash="-",
                role="admin" if name == "admin" else "user",
            )
    house = House(create_app(), database, people)
    async with house.http:
        yield house
