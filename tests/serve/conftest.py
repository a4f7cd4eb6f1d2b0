"""Fixtures for tests of the API."""

from collections.abc import AsyncIterator

import pytest

from cluster.db import Database
from cluster.settings import get_settings
from serve.app import create_app
from tests.support.api_client import ApiClient, add_users


@pytest.fixture
async def api(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiClient]:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "false")
    get_settings.cache_clear()
    users = await add_users(database)
    api = ApiClient(create_app(), database, users)
    async with api.http:
        yield api
