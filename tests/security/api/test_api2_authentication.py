"""API2, broken authentication: what an attacker with a stolen credential wants, or without any."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx
import pytest

from cluster import identity
from cluster.db import now
from cluster.errors import Unauthenticated
from cluster.settings import get_settings
from serve.security import rate_limits
from tests.support.api_client import ApiClient

PASSWORD = "correct horse battery"
NEW_PASSWORD = "another horse battery"
LOGIN = {"email": "ada@example.com", "password": PASSWORD}
KEYS = "/api/v1/auth/keys"
CHANGE = {"current_password": PASSWORD, "new_password": NEW_PASSWORD}

EndAccess = Callable[[ApiClient], Awaitable[None]]


@pytest.fixture(autouse=True)
async def _password_of_ada(api: ApiClient) -> None:  # pyright: ignore[reportUnusedFunction]
    rate_limits.limiter.cache_clear()
    await api.set_password("ada", PASSWORD)


async def log_in(api: ApiClient) -> dict[str, str]:
    response = await api.http.post("/api/v1/auth/login", json=LOGIN)
    assert response.status_code == 200, response.text
    return response.json()


async def make_key(api: ApiClient, headers: dict[str, str], **fields: object) -> httpx.Response:
    return await api.http.post(KEYS, json={"name": "key", **fields}, headers=headers)


async def change_own_password(api: ApiClient) -> None:
    tokens = await log_in(api)
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    response = await api.http.put("/api/v1/auth/password", json=CHANGE, headers=headers)
    assert response.status_code == 200, response.text
    headers = {"Authorization": f"Bearer {response.json()['access_token']}"}
    assert (await api.http.get("/api/v1/auth/me", headers=headers)).status_code == 200


async def log_out_everywhere(api: ApiClient) -> None:
    body = {"refresh_token": (await log_in(api))["refresh_token"], "everywhere": True}
    assert (await api.http.post("/api/v1/auth/logout", json=body)).status_code == 204


async def set_password(api: ApiClient) -> None:
    """As `forgearr user password` does."""
    password_hash = await identity.hash_password(NEW_PASSWORD)
    async with api.database.transaction() as session:
        await identity.set_password(session, await identity.get_user(session, "ada@example.com"), password_hash)


async def end_all_credentials(api: ApiClient) -> None:
    """As `forgearr user logout` does."""
    async with api.database.transaction() as session:
        await identity.end_all_credentials(session, await identity.get_user(session, "ada@example.com"))


async def disable_and_enable(api: ApiClient) -> None:
    for active in (False, True):
        async with api.database.transaction() as session:
            await identity.set_active(session, await identity.get_user(session, "ada@example.com"), active)


@pytest.mark.parametrize(
    "end_access", [change_own_password, set_password, log_out_everywhere, end_all_credentials, disable_and_enable]
)
async def test_keep_access_after_the_account_was_secured(api: ApiClient, end_access: EndAccess) -> None:
    stolen = await log_in(api)
    by_token = {"Authorization": f"Bearer {stolen['access_token']}"}
    first = (await make_key(api, by_token)).json()["key"]
    second = (await make_key(api, {"X-API-Key": first})).json()["key"]
    credentials = [by_token, {"X-API-Key": first}, {"X-API-Key": second}]
    for headers in credentials:
        assert (await api.http.get("/api/v1/auth/me", headers=headers)).status_code == 200
    await end_access(api)
    for headers in credentials:
        assert (await api.http.get("/api/v1/auth/me", headers=headers)).status_code == 401
    refreshed = await api.http.post("/api/v1/auth/refresh", json={"refresh_token": stolen["refresh_token"]})
    assert refreshed.status_code == 401


async def test_make_a_key_with_a_request_that_began_before_the_new_password(api: ApiClient) -> None:
    """The request is authenticated before its body arrives, and that may take hours."""
    headers = {"Authorization": f"Bearer {(await log_in(api))['access_token']}", "Content-Type": "application/json"}

    async def slow_body() -> AsyncIterator[bytes]:
        yield b'{"name": '
        await set_password(api)
        yield b'"mine"}'

    response = await api.http.post(KEYS, content=slow_body(), headers=headers)
    assert response.status_code == 401
    async with api.database.read_transaction() as session:
        assert await identity.list_keys(session) == []


async def test_log_in_with_a_password_that_is_changed_meanwhile(api: ApiClient) -> None:
    """Between the check of the password and the login, the account may be secured."""
    async with api.database.read_transaction() as session:
        verified = await identity.get_user(session, "ada@example.com")
    await set_password(api)
    with pytest.raises(Unauthenticated):
        async with api.database.transaction() as session:
            await identity.start_login(session, verified)


async def test_turn_a_key_that_expires_into_one_that_does_not(api: ApiClient) -> None:
    headers = {"Authorization": f"Bearer {(await log_in(api))['access_token']}"}
    short = {"X-API-Key": (await make_key(api, headers, expires_in_days=1)).json()["key"]}
    for longer in ({}, {"expires_in_days": 2}, {"expires_at": (now() + timedelta(days=2)).isoformat()}):
        response = await make_key(api, short, **longer)
        assert (response.status_code, response.json()["error_code"]) == (403, "API_KEY_LIVES_LONGER")
    shorter = await make_key(api, short, expires_at=(now() + timedelta(hours=12)).isoformat())
    assert shorter.status_code == 201
    eternal = {"X-API-Key": (await make_key(api, headers)).json()["key"]}
    assert (await make_key(api, eternal)).status_code == 201


async def test_hide_a_key_among_countless_others(api: ApiClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__MAX_API_KEYS", "3")
    get_settings.cache_clear()
    headers = {"Authorization": f"Bearer {(await log_in(api))['access_token']}"}
    async with api.database.transaction() as session:
        ada = await identity.get_user(session, "ada@example.com")
        await identity.create_key(session, ada.id, "expired", now() - timedelta(seconds=1))  # does not count
    created = [await make_key(api, headers) for _ in range(4)]
    assert [response.status_code for response in created] == [201, 201, 201, 409]
    assert created[3].json()["error_code"] == "TOO_MANY_API_KEYS"
    listed = (await api.http.get(KEYS, headers=headers)).json()["items"]
    await api.http.delete(f"{KEYS}/{listed[0]['id']}", headers=headers)
    assert (await make_key(api, headers)).status_code == 201


async def test_take_over_an_account_with_a_stolen_token(api: ApiClient) -> None:
    headers = {"Authorization": f"Bearer {(await log_in(api))['access_token']}"}
    wrong = {**CHANGE, "current_password": "a guess of a thief"}
    response = await api.http.put("/api/v1/auth/password", json=wrong, headers=headers)
    assert (response.status_code, response.json()["error_code"]) == (403, "WRONG_PASSWORD")
    for _ in range(9):
        await api.http.put("/api/v1/auth/password", json=wrong, headers=headers)
    guessed = await api.http.put("/api/v1/auth/password", json=CHANGE, headers=headers)
    assert guessed.status_code == 429  # guesses count as failed logins
    rate_limits.limiter.cache_clear()
    assert (await log_in(api))["access_token"]


async def test_log_everybody_out_with_an_old_refresh_token(api: ApiClient) -> None:
    used = (await log_in(api))["refresh_token"]
    refreshed = (await api.http.post("/api/v1/auth/refresh", json={"refresh_token": used})).json()
    for token in (used, "refresh_unknown"):
        body = {"refresh_token": token, "everywhere": True}
        assert (await api.http.post("/api/v1/auth/logout", json=body)).status_code == 401
    headers = {"Authorization": f"Bearer {refreshed['access_token']}"}
    assert (await api.http.get("/api/v1/auth/me", headers=headers)).status_code == 200


WRONG = {**LOGIN, "password": "a wrong guess"}


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
