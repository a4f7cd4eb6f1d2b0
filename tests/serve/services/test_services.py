"""/api/services and /health/{service}, on the whole application, with fakes of services on loopback."""

import asyncio
import logging
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from sqlalchemy import select, update

from cluster.db import Database, now
from cluster.services import store as service_store
from cluster.services.catalog import all_connectors
from cluster.services.health_checks import ServiceCheck
from cluster.settings import get_settings
from jobs.tables import Job, Schedule
from pipelines.media.check_services import CheckServicesSpec, check_services, remove_old_checks
from serve.app import create_app
from serve.monitoring import health
from serve.services import health as services_health
from tests.support.services.fake_services import FAKE_SERVICES, KEY
from tests.support.services.stub_server import StubServer, html_page, stub_server, text_response
from tests.support.waiting import TIMEOUT

WRONG_KEY = "ffffffffffffffffffffffffffffffff"
UNREACHABLE = "http://127.0.0.1:9"


@pytest.fixture
def app(database: Database, monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    monkeypatch.setattr(health, "CACHE_SECONDS", 0)
    monkeypatch.setattr(health, "CHECK_TIMEOUT_SECONDS", TIMEOUT)
    return create_app()


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8000") as client:
        yield client


@pytest.fixture
async def sonarr() -> AsyncIterator[StubServer]:
    async with stub_server(FAKE_SERVICES["sonarr"]) as server:
        yield server


async def create(client: httpx.AsyncClient, url: str, **fields: Any) -> dict[str, Any]:
    response = await client.post("/api/services", json={"name": "TV", "type": "sonarr", "url": url, **fields})
    assert response.status_code == 201, response.text
    return response.json()


async def test_a_service_is_created_tested_changed_and_deleted(client: httpx.AsyncClient, sonarr: StubServer) -> None:
    created = await create(client, sonarr.url, api_key=KEY)
    assert (created["is_healthy"], created["last_check"], created["has_key"], created["enabled"]) == (
        None,
        None,
        True,
        True,
    )
    tested = (await client.post(f"/api/services/{created['id']}/test")).json()
    assert (tested["success"], tested["message"], tested["version"]) == (True, "Connection successful", "4.0.14.2939")
    assert tested["response_time_ms"] > 0
    (listed,) = (await client.get("/api/services")).json()
    assert (listed["id"], listed["name"], listed["type"], listed["url"]) == (created["id"], "TV", "sonarr", sonarr.url)
    assert listed["is_healthy"] is True
    assert listed["last_check"].endswith("Z")
    assert listed == (await client.get(f"/api/services/{created['id']}")).json()
    changed = (await client.put(f"/api/services/{created['id']}", json={"name": "Series", "enabled": False})).json()
    assert (changed["name"], changed["enabled"], changed["has_key"]) == ("Series", False, True)
    assert (await client.delete(f"/api/services/{created['id']}")).status_code == 204
    deleted = await client.get(f"/api/services/{created['id']}")
    assert (deleted.status_code, deleted.json()["error_code"]) == (404, "SERVICE_NOT_FOUND")


async def test_a_key_is_sent_only_to_its_service(
    client: httpx.AsyncClient, sonarr: StubServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    created = await create(client, sonarr.url, api_key=WRONG_KEY)
    texts = [(await client.post(f"/api/services/{created['id']}/test")).text]
    for path in ("", f"/{created['id']}", f"/{created['id']}/checks"):
        texts.append((await client.get(f"/api/services{path}")).text)
    for path in ("/health", "/health/sonarr", "/health/circuit-breaker/sonarr", "/api/v1/jobs"):
        texts.append((await client.get(path)).text)
    texts.append((await client.put(f"/api/services/{created['id']}", json={"api_key": f"{WRONG_KEY}\n"})).text)
    assert "with this API key" in texts[0]
    assert WRONG_KEY not in "".join(texts)
    messages = [
        record.getMessage() for record in caplog.records if record.name.startswith(("cluster", "serve", "httpx"))
    ]
    assert WRONG_KEY not in "".join(messages)
    assert sonarr.requests[0].headers["x-api-key"] == WRONG_KEY


async def test_a_failed_test_reports_its_reason(client: httpx.AsyncClient) -> None:
    async with (
        stub_server(FAKE_SERVICES["radarr"]) as radarr,
        stub_server(lambda request: html_page("Welcome")) as other,
    ):
        service = await create(client, radarr.url, api_key=KEY)
        address = f"/api/services/{service['id']}"
        assert (await client.post(f"{address}/test")).json() == {
            "success": False,
            "message": "Radarr answers at the address of TV, not Sonarr.",
            "response_time_ms": pytest.approx(0, abs=10_000),
            "version": None,
            "error_code": "WRONG_SERVICE",
        }
        for url, code in ((other.url, "SERVICE_BAD_RESPONSE"), (UNREACHABLE, "SERVICE_UNREACHABLE")):
            assert (await client.put(address, json={"url": url, "api_key": KEY})).status_code == 200
            tested = (await client.post(f"{address}/test")).json()
            assert (tested["success"], tested["error_code"]) == (False, code)
    assert tested["response_time_ms"] is None
    checks = (await client.get(f"{address}/checks")).json()
    assert [check["error_code"] for check in checks["items"]] == [
        "SERVICE_UNREACHABLE",
        "SERVICE_BAD_RESPONSE",
        "WRONG_SERVICE",
    ]


async def test_an_unreadable_key_is_a_clear_error(
    client: httpx.AsyncClient, sonarr: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = await create(client, sonarr.url, api_key=KEY)
    monkeypatch.setenv("FORGEARR_AUTH__SEALING_KEY", 32 * "x")
    get_settings.cache_clear()
    tested = (await client.post(f"/api/services/{created['id']}/test")).json()
    assert (tested["success"], tested["error_code"]) == (False, "SEAL_BROKEN")
    shows = await client.get("/api/v1/shows")
    assert (shows.status_code, shows.json()["error_code"]) == (503, "SEAL_BROKEN")
    assert sonarr.requests == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"url": "http://169.254.169.254"}, 400, "INVALID_SERVICE_URL"),
        ({"url": "http://ada:secret@tv"}, 400, "INVALID_SERVICE_URL"),
        ({"type": "sonar"}, 422, "UNKNOWN_SERVICE_TYPE"),
        ({"name": "Radarr"}, 422, "MISLEADING_SERVICE_NAME"),
        ({"name": "two\nlines"}, 422, "VALIDATION_ERROR"),
        ({"name": " TV"}, 422, "VALIDATION_ERROR"),
        ({"enabled": "yes"}, 422, "VALIDATION_ERROR"),
        ({"colour": "red"}, 422, "VALIDATION_ERROR"),
        ({"name": "tv"}, 409, "SERVICE_NAME_TAKEN"),
    ],
)
async def test_invalid_services_are_refused(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, code: str
) -> None:
    await create(client, UNREACHABLE)
    service = {"name": "Another", "type": "sonarr", "url": UNREACHABLE, **body}
    response = await client.post("/api/services", json=service)
    assert (response.status_code, response.json()["error_code"]) == (status, code)
    assert len((await client.get("/api/services")).json()) == 1


@pytest.mark.parametrize("field", ["name", "type", "url", "verify_tls", "enabled"])
async def test_only_the_key_of_a_service_can_be_removed(client: httpx.AsyncClient, field: str) -> None:
    created = await create(client, UNREACHABLE, api_key=KEY)
    refused = await client.put(f"/api/services/{created['id']}", json={field: None})
    assert (refused.status_code, list(refused.json()["details"])) == (422, [field])
    assert (await client.put(f"/api/services/{created['id']}", json={"api_key": None})).json()["has_key"] is False


async def test_new_and_changed_services_are_checked_and_scheduled(
    client: httpx.AsyncClient, database: Database, sonarr: StubServer
) -> None:
    created = await create(client, sonarr.url, api_key=KEY)
    address = f"/api/services/{created['id']}"
    for changes in ({"name": "Series"}, {"api_key": WRONG_KEY}, {"enabled": False}, {"enabled": True}):
        assert (await client.put(address, json=changes)).status_code == 200
    async with database.read_transaction() as session:
        jobs = [*await session.scalars(select(Job))]
        checking, watching = await session.scalars(select(Schedule).order_by(Schedule.name))
    assert [(job.kind, job.spec) for job in jobs] == 3 * [("check_services", {"service_id": created["id"]})]
    assert (checking.kind, checking.cron) == ("check_services", "*/5 * * * *")
    assert (watching.kind, watching.cron) == ("watch_downloads", "* * * * *")
    assert WRONG_KEY not in str([job.spec for job in jobs])


async def test_the_job_checks_every_enabled_service(
    client: httpx.AsyncClient, database: Database, sonarr: StubServer
) -> None:
    await create(client, sonarr.url, api_key=KEY)
    await create(client, UNREACHABLE, name="Broken", type="radarr", api_key=KEY)
    await create(client, UNREACHABLE, name="Off", type="plex", enabled=False)

    class Context:
        def report(self, **_: object) -> None: ...

    context: Any = Context()
    result = await asyncio.to_thread(check_services, context, CheckServicesSpec())
    assert result["checked"] == 2
    assert list(result["unhealthy"]) == ["Broken"]
    health = (await client.get("/health")).json()
    assert health["status"] == "degraded"
    assert {name: entry["healthy"] for name, entry in health["services"].items()} == {"sonarr": True, "radarr": False}


async def test_old_checks_are_removed(client: httpx.AsyncClient, database: Database, sonarr: StubServer) -> None:
    created = await create(client, sonarr.url, api_key=KEY)
    for _ in range(2):
        await client.post(f"/api/services/{created['id']}/test")
    async with database.transaction() as session:
        first = await session.scalar(select(ServiceCheck.id).order_by(ServiceCheck.id).limit(1))
        old = update(ServiceCheck).where(ServiceCheck.id == first).values(at=now() - timedelta(days=31))
        await session.execute(old)
    assert await remove_old_checks(database) == 1
    assert (await client.get(f"/api/services/{created['id']}/checks")).json()["total"] == 1


async def test_types_list_their_capabilities(client: httpx.AsyncClient) -> None:
    types = {entry["type"]: entry for entry in (await client.get("/api/services/types")).json()}
    assert types.keys() == all_connectors().keys()
    assert types["sonarr"]["needs_key"]
    assert "queue" in types["sonarr"]["capabilities"]
    assert (types["searxng"]["takes_key"], types["qbittorrent"]["takes_key"]) == (False, True)


# Health


async def test_health_reports_all_services_and_calls_none(client: httpx.AsyncClient, sonarr: StubServer) -> None:
    created = await create(client, sonarr.url, api_key=KEY)
    second = await create(client, sonarr.url, name="4K", api_key=WRONG_KEY)
    assert (await client.get("/health")).json()["services"]["sonarr"] == {
        "healthy": None,
        "latency_ms": None,
        "error": None,
        "last_check": None,
        "circuit_breaker_state": "closed",
    }
    assert sonarr.requests == []
    for service in (created, second):
        await client.post(f"/api/services/{service['id']}/test")
    body = (await client.get("/health")).json()
    assert body["status"] == "degraded"
    assert body["services"]["sonarr"]["healthy"] is True
    assert "with this API key" in body["services"]["4K"]["error"]


async def test_health_is_200_although_all_services_are_unreachable(client: httpx.AsyncClient) -> None:
    created = await create(client, UNREACHABLE, api_key=KEY)
    await client.post(f"/api/services/{created['id']}/test")
    response = await client.get("/health")
    assert (response.status_code, response.json()["status"], response.json()["database"]) == (
        200,
        "unhealthy",
        "connected",
    )


async def test_the_health_of_one_service(
    client: httpx.AsyncClient, sonarr: StubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(services_health, "MAX_CHECK_AGE", timedelta(hours=1))
    await create(client, sonarr.url, api_key=KEY)
    for name in ("sonarr", "TV", "tv"):
        response = await client.get(f"/health/{name}")
        assert response.status_code == 200
        assert response.json().keys() == {"healthy", "latency_ms", "error", "last_check", "circuit_breaker_state"}
    assert response.json()["healthy"] is True
    assert len(sonarr.requests) == 1  # the result of the first check is cached


async def test_an_unavailable_service_is_503_and_an_unknown_one_404(client: httpx.AsyncClient) -> None:
    await create(client, UNREACHABLE, name="sonarr", api_key=KEY)
    await create(client, UNREACHABLE, name="radarr", type="radarr", enabled=False)
    for name in ("sonarr", "radarr", "plex"):
        response = await client.get(f"/health/{name}")
        assert (response.status_code, response.json()["error"]) == (503, "service_unavailable")
        assert response.json()["message"] == f"Service '{name}' is not connected"
    assert "cannot be reached" in (await client.get("/health/sonarr")).json()["details"]["error"]
    for path in ("/health/nothing", "/health/circuit-breaker/nothing", "/health/circuit-breaker/plex"):
        response = await client.get(path)
        assert (response.status_code, response.json()["error_code"]) == (404, "SERVICE_NOT_FOUND")


async def test_the_circuit_breaker_opens_and_a_test_closes_it(client: httpx.AsyncClient, database: Database) -> None:
    broken = True
    fake = FAKE_SERVICES["sonarr"]
    async with stub_server(lambda request: text_response("down", 503) if broken else fake(request)) as server:
        created = await create(client, server.url, api_key=KEY)
        for _ in range(5):
            await client.post(f"/api/services/{created['id']}/test")
        body = (await client.get("/health/circuit-breaker/sonarr")).json()
        assert body == {"state": "open", "failure_count": 5, "success_count": 0, "threshold": 5, "timeout": 60.0}
        assert (await client.get("/health")).json()["services"]["sonarr"]["circuit_breaker_state"] == "open"
        broken = False
        assert (await client.post(f"/api/services/{created['id']}/test")).json()["success"] is True
        body = (await client.get("/health/circuit-breaker/TV")).json()
        assert body == {"state": "closed", "failure_count": 0, "success_count": 1, "threshold": 5, "timeout": 60.0}


async def test_declared_services_are_listed_and_cannot_be_changed(
    client: httpx.AsyncClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(
        "FORGEARR_SERVICES__DECLARED", f"[{{name: TV, type: sonarr, url: '{UNREACHABLE}', api_key: {KEY}}}]"
    )
    get_settings.cache_clear()
    async with database.transaction() as session:
        await service_store.declare(session, get_settings().services.declared)
    (listed,) = (await client.get("/api/services")).json()
    assert (listed["declared"], listed["created_by"], listed["has_key"]) == (True, "settings", True)
    for response in (
        await client.put(f"/api/services/{listed['id']}", json={"enabled": False}),
        await client.delete(f"/api/services/{listed['id']}"),
    ):
        assert (response.status_code, response.json()["error_code"]) == (409, "SERVICE_DECLARED")
