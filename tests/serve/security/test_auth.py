"""Credentials over HTTP, and the protection of a server that requires none."""

import asyncio
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from datetime import timedelta
from typing import Any

import httpx
import jwt
import pytest
from fastapi import FastAPI, WebSocket
from sqlalchemy import select, update

from cluster import identity
from cluster.db import Database, now
from cluster.secrets import signing_key
from cluster.settings import get_settings
from serve.http.error_handlers import handle_errors
from serve.http.mounts import Mount, mount_all
from serve.middleware import strict_input
from serve.security import rate_limits
from serve.security.callers import AdminCaller, CurrentCaller, SocketCaller
from serve.security.origins import OriginGuard
from serve.security.routes import router

PASSWORD = "correct horse battery"
LOGIN = {"email": "ada@example.com", "password": PASSWORD}


def build_app() -> FastAPI:
    app = FastAPI()
    mount_all(app, [Mount(router, "Auth")])
    app.add_middleware(strict_input.InputValidationMiddleware)
    app.add_middleware(OriginGuard)
    handle_errors(app)

    @app.get("/whoami")
    async def whoami(caller: CurrentCaller) -> str:
        return f"{caller.name} {'admin' if caller.is_admin else 'user'}"

    @app.get("/admin")
    async def admin(caller: AdminCaller) -> str:
        return caller.name

    @app.websocket("/socket")
    async def socket(socket: WebSocket, caller: SocketCaller) -> None:
        await socket.accept()
        await socket.send_text(caller.name)
        await socket.close()

    return app


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server on loopback, which requires no credential."""
    rate_limits.limiter.cache_clear()
    transport = httpx.ASGITransport(build_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture
def configure(database: Database, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Change settings: `configure(auth__required="true")`."""

    def change(**settings: str) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"FORGEARR_{name.upper()}", value)
        get_settings.cache_clear()

    return change


@pytest.fixture
def required(configure: Callable[..., None]) -> None:
    """The server requires credentials, as behind a reverse proxy on the same machine."""
    configure(auth__required="true")


async def add_user(database: Database, name: str = "ada", role: identity.Role = "user") -> identity.User:
    password_hash = await identity.hash_password(PASSWORD)
    async with database.transaction() as session:
        return await identity.add_user(
            session, email=f"{name}@example.com", username=name, password_hash=password_hash, role=role
        )


async def add_key(database: Database, user: identity.User) -> str:
    async with database.transaction() as session:
        return (await identity.create_key(session, user.id, "test"))[1]


async def disable(database: Database, user: identity.User) -> None:
    async with database.transaction() as session:
        await identity.set_active(session, await identity.get_user(session, user.email), False)


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


# Registration and login


async def test_a_registered_user_can_log_in(client: httpx.AsyncClient) -> None:
    body = {"email": "Ada@Example.com", "username": "ada", "password": PASSWORD, "full_name": "Ada L."}
    registered = await client.post("/api/v1/auth/register", json=body)
    assert registered.status_code == 201
    account = registered.json()
    assert (account["email"], account["username"], account["role"]) == ("ada@example.com", "ada", "user")
    assert account["created_at"].endswith("Z")
    assert PASSWORD not in registered.text
    assert "argon2" not in registered.text

    response = await client.post("/api/v1/auth/login", json=LOGIN)
    tokens = response.json()
    assert (response.status_code, tokens["token_type"], tokens["expires_in"]) == (200, "bearer", 3600)
    me = (await client.get("/api/v1/auth/me", headers=bearer(tokens["access_token"]))).json()
    assert (me["id"], me["full_name"]) == (account["id"], "Ada L.")
    assert me["last_login_at"].endswith("Z")


async def test_registering_twice_is_a_conflict(client: httpx.AsyncClient) -> None:
    body = {"email": "ada@example.com", "username": "ada", "password": PASSWORD}
    assert (await client.post("/api/v1/auth/register", json=body)).status_code == 201
    again = await client.post("/api/v1/auth/register", json=body)
    assert (again.status_code, again.json()["error_code"]) == (409, "ACCOUNT_EXISTS")


@pytest.mark.parametrize(
    "change",
    [{"email": "ada"}, {"username": "a b"}, {"password": "short"}, {"password": "x" * 257}, {"full_name": "\n"}],
)
async def test_a_malformed_registration_is_refused(client: httpx.AsyncClient, change: dict[str, str]) -> None:
    body = {"email": "ada@example.com", "username": "ada", "password": PASSWORD} | change
    response = await client.post("/api/v1/auth/register", json=body)
    assert response.status_code == 422
    assert list(response.json()["details"]) == list(change)


@pytest.mark.usefixtures("required")
async def test_closed_registration_is_for_admins(client: httpx.AsyncClient, database: Database) -> None:
    body = {"email": "new@example.com", "username": "new", "password": PASSWORD}
    user = await add_key(database, await add_user(database))
    admin = await add_key(database, await add_user(database, "root", "admin"))
    for headers in ({}, {"X-API-Key": user}):
        refused = await client.post("/api/v1/auth/register", json=body, headers=headers)
        assert (refused.status_code, refused.json()["error_code"]) == (403, "REGISTRATION_CLOSED")
    allowed = await client.post("/api/v1/auth/register", json=body, headers={"X-API-Key": admin})
    assert (allowed.status_code, allowed.json()["role"]) == (201, "user")


async def test_wrong_email_and_wrong_password_get_the_same_response(
    client: httpx.AsyncClient, database: Database
) -> None:
    await add_user(database)
    nobody = await client.post("/api/v1/auth/login", json=LOGIN | {"email": "nobody@example.com"})
    wrong = await client.post("/api/v1/auth/login", json=LOGIN | {"password": "wrong password"})
    assert nobody.status_code == wrong.status_code == 401
    assert nobody.json()["message"] == wrong.json()["message"]


async def test_a_disabled_account_is_revealed_only_with_its_password(
    client: httpx.AsyncClient, database: Database
) -> None:
    await disable(database, await add_user(database))
    right = await client.post("/api/v1/auth/login", json=LOGIN)
    assert (right.status_code, right.json()["error_code"]) == (403, "ACCOUNT_DISABLED")
    assert (await client.post("/api/v1/auth/login", json=LOGIN | {"password": "wrong one"})).status_code == 401


async def test_failed_logins_are_throttled(client: httpx.AsyncClient, database: Database) -> None:
    await add_user(database)
    for _ in range(10):
        failed = await client.post("/api/v1/auth/login", json=LOGIN | {"password": "wrong one"})
        assert failed.status_code == 401
    response = await client.post("/api/v1/auth/login", json=LOGIN | {"email": " ADA@example.com"})
    assert (response.status_code, response.json()["error"]) == (429, "rate_limit_exceeded")
    assert 0 < response.json()["retry_after"] <= 900
    assert response.headers["Retry-After"] == str(response.json()["retry_after"])


async def test_simultaneous_guesses_are_throttled(
    client: httpx.AsyncClient, database: Database, configure: Callable[..., None]
) -> None:
    configure(auth__login_attempts="3/hour")
    await add_user(database)

    async def login(password: str) -> int:
        return (await client.post("/api/v1/auth/login", json=LOGIN | {"password": password})).status_code

    wrong = [asyncio.create_task(login(f"wrong guess {number}")) for number in range(12)]
    await asyncio.wait(wrong, return_when=asyncio.FIRST_COMPLETED)
    # The other guesses are ahead of the right password by now.
    assert await login(LOGIN["password"]) == 429
    assert Counter([await task for task in wrong]) == {401: 3, 429: 9}


# Refreshing and logging out


async def test_refreshing_rotates_and_reuse_ends_the_login(client: httpx.AsyncClient, database: Database) -> None:
    await add_user(database)
    first = (await client.post("/api/v1/auth/login", json=LOGIN)).json()

    async def refresh(token: str) -> httpx.Response:
        return await client.post("/api/v1/auth/refresh", json={"refresh_token": token})

    second = await refresh(first["refresh_token"])
    assert second.status_code == 200
    assert (await client.get("/whoami", headers=bearer(second.json()["access_token"]))).json() == "ada user"
    assert (await refresh(first["refresh_token"])).status_code == 401
    assert (await refresh(second.json()["refresh_token"])).status_code == 401


async def test_logging_out_ends_the_login(client: httpx.AsyncClient, database: Database) -> None:
    await add_user(database)
    tokens = (await client.post("/api/v1/auth/login", json=LOGIN)).json()
    body = {"refresh_token": tokens["refresh_token"]}
    assert (await client.post("/api/v1/auth/logout", json=body)).status_code == 204
    assert (await client.post("/api/v1/auth/refresh", json=body)).status_code == 401


# API keys


async def test_a_key_is_shown_once_works_and_is_revoked(client: httpx.AsyncClient, database: Database) -> None:
    token = identity.create_access_token(await add_user(database))
    created = await client.post("/api/v1/auth/keys", json={"name": "laptop"}, headers=bearer(token))
    key = created.json()["key"]
    assert created.status_code == 201
    assert created.json()["last_used_at"] is None
    for headers in ({"X-API-Key": key}, bearer(key)):
        assert (await client.get("/whoami", headers=headers)).json() == "ada user"

    listed = await client.get("/api/v1/auth/keys", headers=bearer(token))
    (item,) = listed.json()["items"]
    assert (item["name"], item["prefix"]) == ("laptop", key[:12])
    assert item["last_used_at"].endswith("Z")
    assert key not in listed.text

    assert (await client.delete(f"/api/v1/auth/keys/{item['id']}", headers=bearer(token))).status_code == 204
    assert (await client.get("/whoami", headers={"X-API-Key": key})).status_code == 401


async def test_anonymous_bodies_have_a_small_limit(
    client: httpx.AsyncClient, database: Database, required: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(strict_input, "MAX_ANONYMOUS_BODY_BYTES", 1000)
    key = await add_key(database, await add_user(database))
    long = LOGIN | {"password": "x" * 2000}

    async def chunks() -> AsyncIterator[bytes]:
        yield json.dumps(long).encode()

    json_type = {"Content-Type": "application/json"}
    callers = {"": "BODY_TOO_LARGE", f"{key}x": "UNAUTHORIZED", key: "VALIDATION_ERROR"}
    for credential, code in callers.items():
        headers = json_type | ({"X-API-Key": credential} if credential else {})
        for body in (json.dumps(long).encode(), chunks()):
            response = await client.post("/api/v1/auth/login", content=body, headers=headers)
            assert response.json()["error_code"] == code


async def test_a_key_belongs_to_its_user(client: httpx.AsyncClient, database: Database) -> None:
    ada, bob = await add_user(database), await add_user(database, "bob", "admin")
    key = await add_key(database, ada)
    (item,) = (await client.get("/api/v1/auth/keys", headers={"X-API-Key": key})).json()["items"]
    other = bearer(identity.create_access_token(bob))
    assert (await client.get("/api/v1/auth/keys", headers=other)).json()["items"] == []
    assert (await client.delete(f"/api/v1/auth/keys/{item['id']}", headers=other)).status_code == 404
    assert (await client.get("/whoami", headers={"X-API-Key": key})).status_code == 200


async def test_a_key_expires(client: httpx.AsyncClient, database: Database) -> None:
    headers = bearer(identity.create_access_token(await add_user(database)))
    body = {"name": "ci", "expires_in_days": 30}
    created = (await client.post("/api/v1/auth/keys", json=body, headers=headers)).json()
    assert created["expires_at"] > created["created_at"]
    async with database.transaction() as session:
        await session.execute(update(identity.ApiKey).values(expires_at=now() - timedelta(seconds=1)))
    assert (await client.get("/whoami", headers={"X-API-Key": created["key"]})).status_code == 401


@pytest.mark.parametrize(
    "expiry",
    [
        {"expires_at": "2020-01-01T00:00:00Z"},
        {"expires_at": "9999-12-31T23:59:59-23:59"},
        {"expires_at": "2030-01-01T00:00:00"},
        {"expires_at": "2027-01-01T00:00:00Z", "expires_in_days": 1},
        {"expires_in_days": 0},
    ],
)
async def test_an_invalid_expiry_is_refused(
    client: httpx.AsyncClient, database: Database, expiry: dict[str, Any]
) -> None:
    headers = bearer(identity.create_access_token(await add_user(database)))
    response = await client.post("/api/v1/auth/keys", json={"name": "ci"} | expiry, headers=headers)
    assert response.status_code == 422


async def test_a_key_needs_an_account(client: httpx.AsyncClient) -> None:
    response = await client.post("/api/v1/auth/keys", json={"name": "laptop"})
    assert (response.status_code, response.json()["error_code"]) == (409, "ACCOUNT_REQUIRED")
    assert (await client.get("/api/v1/auth/keys")).json()["items"] == []


async def test_the_use_of_a_key_is_recorded(client: httpx.AsyncClient, database: Database) -> None:
    key = await add_key(database, await add_user(database))
    await client.get("/whoami", headers={"X-API-Key": key})
    async with database.read_transaction() as session:
        assert await session.scalar(select(identity.ApiKey.last_used_at)) is not None


# Callers


async def test_the_local_user_of_an_open_server_is_its_admin(client: httpx.AsyncClient) -> None:
    assert (await client.get("/whoami")).json() == "local admin"
    me = (await client.get("/api/v1/auth/me")).json()
    assert (me["id"], me["username"], me["role"]) == (None, "local", "admin")


WRONG_CREDENTIALS = [
    {"X-API-Key": ""},
    {"X-API-Key": "fgr_wrong"},
    {"Authorization": "Bearer fgr_wrong"},
    {"Authorization": "Bearer not.a.token"},
    {"Authorization": "Bearer"},
    {"Authorization": "Basic YWRhOmFkYQ=="},
]


@pytest.mark.parametrize("headers", WRONG_CREDENTIALS)
async def test_a_wrong_credential_is_refused_where_none_is_required(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await client.get("/whoami", headers=headers)
    assert (response.status_code, response.json()["error"]) == (401, "unauthorized")


@pytest.mark.usefixtures("required")
@pytest.mark.parametrize("headers", [{}, *WRONG_CREDENTIALS])
async def test_a_server_that_requires_credentials_refuses_others(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    assert (await client.get("/whoami", headers=headers)).status_code == 401


@pytest.mark.usefixtures("required")
async def test_admin_routes_are_for_admins(client: httpx.AsyncClient, database: Database) -> None:
    user, admin = await add_user(database), await add_user(database, "root", "admin")
    assert (await client.get("/admin")).status_code == 401
    assert (await client.get("/admin", headers=bearer(identity.create_access_token(user)))).status_code == 403
    assert (await client.get("/admin", headers=bearer(identity.create_access_token(admin)))).json() == "root"


async def test_the_role_comes_from_the_account_not_the_token(client: httpx.AsyncClient, database: Database) -> None:
    user = await add_user(database)
    claims = jwt.decode(identity.create_access_token(user), signing_key(), algorithms=["HS256"]) | {"role": "admin"}
    token = jwt.encode(claims, signing_key(), algorithm="HS256")
    assert (await client.get("/whoami", headers=bearer(token))).json() == "ada user"


async def test_a_disabled_account_loses_access_at_once(client: httpx.AsyncClient, database: Database) -> None:
    user = await add_user(database)
    credentials = [bearer(identity.create_access_token(user)), {"X-API-Key": await add_key(database, user)}]
    await disable(database, user)
    for headers in credentials:
        response = await client.get("/whoami", headers=headers)
        assert (response.status_code, response.json()["error_code"]) == (403, "ACCOUNT_DISABLED")


def test_openapi_declares_both_credentials() -> None:
    schema = build_app().openapi()
    assert {scheme["type"] for scheme in schema["components"]["securitySchemes"].values()} == {"apiKey", "http"}
    assert len(schema["paths"]["/whoami"]["get"]["security"]) == 2
    assert "security" not in schema["paths"]["/api/v1/auth/login"]["post"]


# WebSockets


async def connect(query: str = "", **headers: str) -> list[dict[str, Any]]:
    """The messages of the server in one WebSocket handshake."""
    scope = {
        "type": "websocket",
        "path": "/socket",
        "scheme": "ws",
        "query_string": query.encode(),
        "headers": [(b"host", b"127.0.0.1:8000")]
        + [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()],
        "client": ("127.0.0.1", 40000),
        "extensions": {"websocket.http.response": {}},
    }
    messages: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: Any) -> None:
        messages.append(message)

    await build_app()(scope, receive, send)
    return messages


@pytest.mark.usefixtures("required")
async def test_a_socket_takes_its_credential_from_header_or_query(database: Database) -> None:
    user = await add_user(database)
    token, key = identity.create_access_token(user), await add_key(database, user)
    for messages in (
        await connect(x_api_key=key),
        await connect(authorization=f"Bearer {token}"),
        await connect(f"token={token}"),
        await connect(f"token={key}"),
        await connect(f"api_key={key}"),
    ):
        assert messages[1]["text"] == "ada"
    for messages in (await connect(), await connect("token=wrong"), await connect("api_key=")):
        assert (messages[0]["type"], messages[0]["status"]) == ("websocket.http.response.start", 401)


async def test_a_page_of_another_origin_gets_no_socket(database: Database) -> None:
    assert (await connect(origin="http://127.0.0.1:8000"))[0]["type"] == "websocket.accept"
    assert (await connect(origin="https://evil.example"))[0]["status"] == 403


@pytest.mark.usefixtures("required")
async def test_a_credential_in_the_query_of_a_request_is_ignored(client: httpx.AsyncClient, database: Database) -> None:
    key = await add_key(database, await add_user(database))
    assert (await client.get("/whoami", params={"api_key": key})).status_code == 401


# Web pages


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8000"},
        {"Host": "localhost.evil.example:8000"},
        {"Host": "evil@localhost"},
        {"Host": "[::1"},
        {"Host": ""},
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9000"},
        {"Origin": "https://127.0.0.1:8000"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "cross-site"},
    ],
)
async def test_an_open_server_refuses_pages_of_other_origins(
    client: httpx.AsyncClient, headers: dict[str, str]
) -> None:
    response = await client.get("/whoami", headers=headers)
    assert (response.status_code, response.json()["error_code"]) == (403, "CROSS_ORIGIN")


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "localhost"},
        {"Host": "LOCALHOST:8000"},
        {"Host": "[::1]:8000", "Origin": "http://[::1]:8000"},
        {"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"},
        {"Sec-Fetch-Site": "none"},
    ],
)
async def test_an_open_server_accepts_its_own_pages(client: httpx.AsyncClient, headers: dict[str, str]) -> None:
    assert (await client.get("/whoami", headers=headers)).json() == "local admin"


async def test_hosts_and_origins_can_be_allowed(client: httpx.AsyncClient, configure: Callable[..., None]) -> None:
    configure(serve__allowed_hosts="[box.lan]", serve__allowed_origins="['https://chat.example']")
    allowed = {"Host": "box.lan:8000", "Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
    assert (await client.get("/whoami", headers=allowed)).status_code == 200
    assert (await client.get("/whoami", headers={"Host": "other.lan"})).status_code == 403


@pytest.mark.usefixtures("required")
async def test_a_required_credential_replaces_the_origin_check(client: httpx.AsyncClient, database: Database) -> None:
    headers = {"Host": "api.example", "Origin": "https://evil.example", "Sec-Fetch-Site": "cross-site"}
    assert (await client.get("/whoami", headers=headers)).status_code == 401
    key = await add_key(database, await add_user(database))
    assert (await client.get("/whoami", headers=headers | {"X-API-Key": key})).status_code == 200
