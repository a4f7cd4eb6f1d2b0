"""API2, broken authentication: guessing passwords, and the protection against it as a weapon."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

import httpx
import pytest

from cluster import identity
from cluster.settings import get_settings
from serve.security import rate_limits
from tests.support.api_client import ApiClient

PASSWORD = "correct horse battery"
LOGIN = {"email": "ada@example.com", "password": PASSWORD}
WRONG = {**LOGIN, "password": "a wrong guess"}


@pytest.fixture(autouse=True)
async def _password_of_ada(api: ApiClient) -> None:  # pyright: ignore[reportUnusedFunction]
    rate_limits.limiter.cache_clear()
    async with api.database.transaction() as session:
        ada = await identity.get_user(session, "ada@example.com")
        ada.password_hash = await identity.hash_password(PASSWORD)


@asynccontextmanager
async def client_at(api: ApiClient, address: str) -> AsyncGenerator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(api.app, client=(address, 40000))
    async with httpx.AsyncClient(transport=transport, base_url="https://api.example") as client:
        yield client


async def statuses(client: httpx.AsyncClient, *bodies: dict[str, str]) -> list[int]:
    return [(await client.post("/api/v1/auth/login", json=body)).status_code for body in bodies]


async def test_lock_somebody_else_out_by_guessing(api: ApiClient) -> None:
    async with client_at(api, "198.51.100.1") as guesser, client_at(api, "203.0.113.1") as ada:
        assert await statuses(guesser, *[WRONG] * 11) == [401] * 10 + [429]
        assert await statuses(guesser, LOGIN) == [429]
        assert await statuses(ada, LOGIN) == [200]


async def test_guess_more_often_by_spelling_the_email_differently(api: ApiClient) -> None:
    async with client_at(api, "198.51.100.1") as guesser:
        assert await statuses(guesser, *[WRONG] * 10) == [401] * 10
        spellings = ("ADA@example.com", " ada@example.com", "ada@EXAMPLE.com ")
        assert await statuses(guesser, *({**LOGIN, "email": email} for email in spellings)) == [429] * 3


async def test_guess_the_passwords_of_all_accounts_from_one_address(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__ADDRESS_LOGIN_ATTEMPTS", "5/hour")
    get_settings.cache_clear()
    others = [{**WRONG, "email": f"user{number}@example.com"} for number in range(6)]
    async with client_at(api, "198.51.100.1") as guesser, client_at(api, "203.0.113.1") as ada:
        assert await statuses(guesser, *others) == [401] * 5 + [429]
        assert await statuses(guesser, LOGIN) == [429]
        assert await statuses(ada, LOGIN) == [200]
