"""Rate limits, counted in memory and in Redis."""

import logging
import os
import shutil
import subprocess
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import httpx
import pytest
from fastapi import APIRouter, FastAPI
from starlette.requests import HTTPConnection

from cluster import identity
from cluster.db import Database
from cluster.errors import RateLimitExceeded
from cluster.settings import get_settings
from serve.app import create_app
from serve.http.error_handlers import handle_errors
from serve.http.marks import access, rate_limit
from serve.http.mounts import Mount, mount_all
from serve.security import rate_limits
from serve.security.callers import CurrentCaller
from serve.security.rate_limits import RateLimitMiddleware, check_login, client_address, count_failed_login
from tests.support.platform import unused_ports
from tests.support.waiting import TIMEOUT, eventually

Connect = Callable[[str], AbstractAsyncContextManager[httpx.AsyncClient]]


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Redis that lives as long as the test session."""
    program = shutil.which("redis-server")
    if program is None:
        reason = "Redis is not installed (there is no redis-server), so nothing is tested on it."
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    (port,) = unused_ports(1)
    folder = tmp_path_factory.mktemp("redis")
    command = [program, "--bind", "127.0.0.1", "--port", str(port), "--save", "", "--dir", str(folder)]
    server = subprocess.Popen([*command, "--logfile", str(folder / "log")])
    _wait_until_ready(folder / "log", server)
    yield f"redis://127.0.0.1:{port}"
    server.terminate()
    server.wait(TIMEOUT)


@pytest.fixture
def limited(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Limits of 3 an hour on a server that requires credentials. Call the fixture to change settings."""

    def change(**settings: str) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"FORGEARR_{name.upper()}", value)
        get_settings.cache_clear()
        rate_limits.limiter.cache_clear()

    change(auth__required="true", limits__general="3/hour", limits__health="2/hour", auth__login_attempts="3/hour")
    yield change
    rate_limits.limiter.cache_clear()


@pytest.fixture
def connect() -> Connect:
    """Return a function that makes a client with this address."""
    app = FastAPI()
    app.add_middleware(RateLimitMiddleware)
    handle_errors(app)
    native, openai = APIRouter(), APIRouter()

    @native.get("/whoami")
    async def whoami(caller: CurrentCaller) -> str:
        return caller.name

    @openai.get("/v1/models")
    @access("public")
    async def models() -> list[str]:
        return []

    @native.get("/health")
    @access("public")
    @rate_limit("health")
    async def health() -> str:
        return "healthy"

    mount_all(app, [Mount(native, "Test"), Mount(openai, "Test", "openai")])

    @asynccontextmanager
    async def client(address: str) -> AsyncGenerator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(app, client=(address, 40000))
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            yield client

    return client


async def add_key(database: Database, name: str = "ada") -> dict[str, str]:
    async with database.transaction() as session:
        user = await identity.add_user(session, email=f"{name}@example.com", username=name, password_hash="x")
        _, key = await identity.create_key(session, user.id, "test")
    return {"X-API-Key": key}


@pytest.mark.usefixtures("limited")
async def test_every_response_has_the_callers_remaining_requests(connect: Connect, database: Database) -> None:
    key = await add_key(database)
    async with connect("192.0.2.1") as client:
        for remaining in (2, 1, 0):
            response = await client.get("/whoami", headers=key)
            assert response.status_code == 200
            assert response.headers["X-RateLimit-Limit"] == "3"
            assert response.headers["X-RateLimit-Remaining"] == str(remaining)
            assert time.time() < int(response.headers["X-RateLimit-Reset"]) <= time.time() + 3601
        refused = await client.get("/whoami", headers=key)
    body = refused.json()
    assert (refused.status_code, body["error"], body["error_code"]) == (
        429,
        "rate_limit_exceeded",
        "RATE_LIMIT_EXCEEDED",
    )
    assert body["message"] == f"Rate limit exceeded. Try again in {body['retry_after']} seconds."
    assert refused.headers["Retry-After"] == str(body["retry_after"])
    assert 0 < body["retry_after"] <= 3600
    assert refused.headers["X-RateLimit-Remaining"] == "0"


@pytest.mark.usefixtures("limited")
async def test_openai_clients_get_openais_error(connect: Connect) -> None:
    async with connect("192.0.2.1") as client:
        responses = [await client.get("/v1/models") for _ in range(4)]
    assert responses[3].status_code == 429
    assert responses[3].json()["error"]["type"] == "rate_limit_error"
    assert "Retry-After" in responses[3].headers


@pytest.mark.usefixtures("limited")
async def test_requests_count_by_credential_from_any_address(connect: Connect, database: Database) -> None:
    ada, bob = await add_key(database), await add_key(database, "bob")
    for number in range(3):
        async with connect(f"192.0.2.{number}") as client:
            assert (await client.get("/whoami", headers=ada)).status_code == 200
    async with connect("192.0.2.9") as client:
        assert (await client.get("/whoami", headers=ada)).status_code == 429
        assert (await client.get("/whoami", headers=bob)).status_code == 200


@pytest.mark.usefixtures("limited", "database")
async def test_invalid_credentials_count_by_address(connect: Connect) -> None:
    async with connect("192.0.2.1") as client:
        statuses = [
            (await client.get("/whoami", headers={"X-API-Key": f"fgr_{number}"})).status_code for number in range(5)
        ]
        assert statuses == [401, 401, 401, 429, 429]
    async with connect("192.0.2.2") as client:
        assert (await client.get("/whoami")).status_code == 401


LIMITS = {
    "health": ["GET /health", "GET /health/sonarr", "GET /health/circuit-breaker/sonarr"],
    "content": [
        *("POST /api/v1/shows", "POST /api/v1/shows/", "POST /api/v1/shows/7/search"),
        *("POST /api/v1/movies", "POST /api/v1/movies/", "POST /api/v1/movies/7/search"),
    ],
    "audit": ["POST /api/v1/config/audit", "POST /api/v1/config/audit%0A"],
    "apply": ["POST /api/v1/config/apply", "POST /api/v1/config/rollback"],
    "recommendations": [
        *("GET /api/v1/config/recommendations", "GET /api/v1/config/recommendations/1", "GET /api/v1/config/rules"),
        *("GET /api/v1/config/audit/history", "GET /api/v1/config/audit/1"),
    ],
    "general": ["GET /api/v1/shows/", "GET /api/v1/movies/7", "PUT /api/v1/settings", "POST /api/v1/shows/x/y/z"],
}


@pytest.mark.parametrize("name", LIMITS)
async def test_routes_of_one_group_share_a_limit(name: str, database: Database, limited: Callable[..., None]) -> None:
    limited(**{f"limits__{limit}": "9/hour" if limit == name else "99/hour" for limit in LIMITS})
    transport = httpx.ASGITransport(create_app(), client=("192.0.2.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="https://api.example") as client:
        key = await add_key(database)
        for number, operation in enumerate(LIMITS[name], 1):
            method, path = operation.split()
            headers = (await client.request(method, path, headers=key)).headers
            assert (headers["X-RateLimit-Limit"], headers["X-RateLimit-Remaining"]) == ("9", str(9 - number)), operation


@pytest.mark.usefixtures("limited")
async def test_health_has_its_own_limit(connect: Connect, database: Database) -> None:
    key = await add_key(database)
    async with connect("192.0.2.1") as client:
        assert [(await client.get("/health", headers=key)).status_code for _ in range(3)] == [200, 200, 429]
        assert (await client.get("/whoami", headers=key)).status_code == 200


async def test_an_open_server_counts_only_when_limits_are_enabled(
    connect: Connect, limited: Callable[..., None]
) -> None:
    limited(auth__required="false")
    async with connect("127.0.0.1") as client:
        responses = [await client.get("/whoami") for _ in range(5)]
        assert {response.status_code for response in responses} == {200}
        assert not [name for name in responses[0].headers if name.startswith("x-ratelimit")]
        limited(limits__enabled="true")
        assert [(await client.get("/whoami")).status_code for _ in range(4)] == [200, 200, 200, 429]


async def test_replicas_count_together_in_redis(
    connect: Connect, limited: Callable[..., None], redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_limits, "STORAGE_TIMEOUT_SECONDS", TIMEOUT)
    limited(limits__storage=redis_url)
    async with connect(f"10.0.0.{uuid4().int % 256}") as client:
        statuses: list[int] = []
        for _ in range(4):
            statuses.append((await client.get("/health")).status_code)
            await _close_redis()
            rate_limits.limiter.cache_clear()  # as if the next request reached another replica
    assert statuses == [200, 200, 429, 429]


async def test_requests_pass_while_the_storage_is_down(
    connect: Connect, limited: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    limited(limits__storage=f"redis://:hunter2@127.0.0.1:{unused_ports(1)[0]}")
    with caplog.at_level(logging.WARNING):
        async with connect("192.0.2.1") as client:
            assert [(await client.get("/health")).status_code for _ in range(3)] == [200, 200, 200]
        await count_failed_login("ada@example.com", "192.0.2.1")
        await check_login("ada@example.com", "192.0.2.1")
    await _close_redis()
    assert "their storage is unreachable" in caplog.text
    assert "hunter2" not in caplog.text


async def test_failed_logins_count_by_account_and_address(limited: Callable[..., None]) -> None:
    limited(auth__address_login_attempts="5/hour")
    for _ in range(3):
        await check_login("ada@example.com", "192.0.2.1")
        await count_failed_login("ada@example.com", "192.0.2.1")
    with pytest.raises(RateLimitExceeded):
        await check_login("Ada@Example.com", "192.0.2.1")
    await check_login("ada@example.com", "203.0.113.1")
    for _ in range(2):
        await count_failed_login("bob@example.com", "192.0.2.1")
    with pytest.raises(RateLimitExceeded):
        await check_login("carol@example.com", "192.0.2.1")
    await check_login("carol@example.com", "203.0.113.1")


@pytest.mark.parametrize(
    ("peer", "address"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("not an address", "unknown"),
        (None, "unknown"),
    ],
)
def test_a_client_cannot_choose_its_address(peer: str | None, address: str) -> None:
    headers = [(b"x-forwarded-for", b"6.6.6.6")]
    scope = {"type": "http", "headers": headers, "client": (peer, 40000) if peer else None}
    assert client_address(HTTPConnection(scope)) == address


def test_behind_haproxy_only_its_forwarded_address_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = HTTPConnection({"type": "http", "headers": [], "client": ("6.6.6.6", 40000)})
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    monkeypatch.delenv("FORWARDED_ALLOW_IPS", raising=False)
    assert client_address(connection) == "proxy"
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", "127.0.0.1")
    assert client_address(connection) == "6.6.6.6"


async def _close_redis() -> None:
    await cast(Any, rate_limits.limiter().storage).bridge.storage.aclose()


def _wait_until_ready(log: Path, server: "subprocess.Popen[bytes]") -> None:
    def ready() -> bool:
        if server.poll() is not None:
            pytest.fail("redis-server ended")
        return log.exists() and "Ready to accept connections" in log.read_text()

    eventually(ready)
