"""/health, /api/v1/ping and the API documentation, on the whole application."""

import asyncio
import re
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from cluster.db import get_database
from cluster.settings import get_settings
from serve.app import create_app
from serve.monitoring import health
from serve.monitoring.health import Health
from tests.support.waiting import TIMEOUT


@pytest.fixture
def app(home: Path, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr(health, "CHECK_TIMEOUT_SECONDS", TIMEOUT)
    return create_app()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client,
    ):
        yield client


async def test_health_has_all_documented_fields(client: httpx.AsyncClient) -> None:
    response = await client.get("/health")
    body = Health.model_validate(response.json())
    assert response.status_code == 200
    assert (body.service, body.database, body.environment) == ("Forgearr", "connected", "production")
    assert response.json()["ollama_available"] is None
    assert response.json()["timestamp"].endswith("Z")


@pytest.mark.parametrize("available", [True, False])
async def test_health_reports_whether_ollama_is_available(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, available: bool
) -> None:
    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        assert request.startswith(b"GET /api/version ")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(respond, "127.0.0.1", 0) as server:
        monkeypatch.setenv("FORGEARR_OLLAMA__URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        get_settings.cache_clear()
        if not available:
            server.close()
        assert (await client.get("/health")).json()["ollama_available"] is available


async def test_health_is_degraded_without_the_actors(client: httpx.AsyncClient) -> None:
    body = Health.model_validate((await client.get("/health")).json())
    assert body.status == "degraded"
    assert body.components.dispatcher == body.components.events == body.components.monitor == "unreachable"


async def test_health_is_unhealthy_without_the_database(
    home: Path, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "forgearr.db").mkdir(parents=True)  # a file that cannot be opened
    response = await client.get("/health")
    body = Health.model_validate(response.json())
    assert (response.status_code, body.status, body.database) == (503, "unhealthy", "disconnected")
    assert "The database does not respond" in caplog.text


async def test_simultaneous_requests_share_one_check(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "CACHE_SECONDS", 3600)
    responses = await asyncio.gather(*(client.get("/health") for _ in range(20)))
    assert len({response.json()["timestamp"] for response in responses}) == 1


async def test_an_expired_check_is_repeated(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CACHE_SECONDS", 0)
    first, second = [(await client.get("/health")).json()["timestamp"] for _ in range(2)]
    assert first != second


@pytest.mark.parametrize("path", ["/health", "/metrics", "/api/v1/ping"])
async def test_monitoring_needs_no_credential(
    path: str, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    get_settings.cache_clear()
    assert (await client.get(path)).status_code == 200
    assert (await client.get("/api/v1/auth/me")).status_code == 401


async def test_a_page_of_another_origin_is_refused(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers={"Host": "evil.example"})).status_code == 403
    assert (await client.get("/health", headers={"Origin": "https://evil.example"})).status_code == 403


async def test_an_allowed_origin_may_read_responses_and_errors(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_SERVE__ALLOWED_ORIGINS", "[https://chat.example]")
    origin = {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
    requested = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        preflight = await client.options("/api/v1/jobs", headers={**origin, **requested})
        refused = await client.get("/api/v1/auth/me", headers={**origin, "X-API-Key": "wrong"})
    await get_database().close()
    assert (preflight.status_code, refused.status_code) == (200, 401)
    for response in (preflight, refused):
        assert response.headers["access-control-allow-origin"] == "https://chat.example"
        assert response.headers["x-request-id"]


async def test_the_documentation_is_served(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/redoc", "/api/v1/openapi.json"):
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_the_documentation_loads_nothing_from_other_servers(client: httpx.AsyncClient, path: str) -> None:
    page = (await client.get(path)).text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert addresses
    for address in addresses:
        assert (await client.get(address)).status_code == 200, address
