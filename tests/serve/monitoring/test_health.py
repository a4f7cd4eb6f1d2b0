"""/health, /api/v1/ping and the documents, on the whole application."""

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


async def test_health_is_the_union_of_the_documents(client: httpx.AsyncClient) -> None:
    answer = await client.get("/health")
    body = Health.model_validate(answer.json())
    assert answer.status_code == 200
    assert (body.service, body.database, body.environment) == ("Forgearr", "connected", "production")
    assert answer.json()["ollama_available"] is None
    assert answer.json()["timestamp"].endswith("Z")


@pytest.mark.parametrize("answers", [True, False])
async def test_health_says_whether_ollama_answers(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch, answers: bool
) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        assert asked.startswith(b"GET /api/version ")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
        monkeypatch.setenv("FORGEARR_OLLAMA__URL", f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/")
        get_settings.cache_clear()
        if not answers:
            server.close()
        assert (await client.get("/health")).json()["ollama_available"] is answers


async def test_without_the_actors_it_is_degraded(client: httpx.AsyncClient) -> None:
    body = Health.model_validate((await client.get("/health")).json())
    assert body.status == "degraded"
    assert (body.components.dispatcher, body.components.events) == ("unreachable", "unreachable")


async def test_without_the_database_it_is_unhealthy(
    home: Path, client: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    (home / "forgearr.db").mkdir(parents=True)  # a file that cannot be opened
    answer = await client.get("/health")
    body = Health.model_validate(answer.json())
    assert (answer.status_code, body.status, body.database) == (503, "unhealthy", "disconnected")
    assert "The database does not respond" in caplog.text


async def test_many_questions_at_once_are_one_look(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "CACHE_SECONDS", 3600)
    answers = await asyncio.gather(*(client.get("/health") for _ in range(20)))
    assert len({answer.json()["timestamp"] for answer in answers}) == 1


async def test_health_looks_again_when_its_answer_is_old(
    client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
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


async def test_a_page_of_another_origin_is_answered_nothing(client: httpx.AsyncClient) -> None:
    assert (await client.get("/health", headers={"Host": "evil.example"})).status_code == 403
    assert (await client.get("/health", headers={"Origin": "https://evil.example"})).status_code == 403


async def test_an_allowed_origin_may_read_answers_and_refusals(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_SERVE__ALLOWED_ORIGINS", "[https://chat.example]")
    origin = {"Origin": "https://chat.example", "Sec-Fetch-Site": "cross-site"}
    asking = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-api-key"}
    transport = httpx.ASGITransport(create_app())
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
        preflight = await client.options("/api/v1/jobs", headers={**origin, **asking})
        refused = await client.get("/api/v1/auth/me", headers={**origin, "X-API-Key": "wrong"})
    await get_database().close()
    assert (preflight.status_code, refused.status_code) == (200, 401)
    for answer in (preflight, refused):
        assert answer.headers["access-control-allow-origin"] == "https://chat.example"
        assert answer.headers["x-request-id"]


async def test_the_documents_are_there(client: httpx.AsyncClient) -> None:
    for path in ("/docs", "/redoc", "/api/v1/openapi.json"):
        assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
async def test_the_documentation_needs_no_other_server(client: httpx.AsyncClient, path: str) -> None:
    page = (await client.get(path)).text
    addresses = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert addresses
    for address in addresses:
        assert (await client.get(address)).status_code == 200, address
