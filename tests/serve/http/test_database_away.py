"""A database that does not respond: every API says 503 in its own form, and works again when the database is back."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.routing import APIRoute, APIWebSocketRoute
from sqlalchemy.engine import make_url
from starlette.types import Message
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosedError

from cluster import identity
from cluster.db import DatabaseUnavailable, get_database
from cluster.settings import get_settings
from jobs.states import State
from serve.app import create_app
from serve.http.errors import ErrorEnvelope, OpenAIErrorEnvelope
from serve.http.marks import access_of
from serve.http.mounts import methods_of
from serve.jobs import events as job_events
from serve.monitoring import metrics
from serve.monitoring.health import Health
from serve.routes import MOUNTS
from serve.security import rate_limits
from tests.conftest import drop_postgres_database, new_postgres_database
from tests.serve.http.relay import Relay, running_relay
from tests.support.api_client import ApiClient, add_users
from tests.support.app_server import running_app
from tests.support.waiting import TIMEOUT, WEBSOCKET_OPTIONS, eventually_async

SAMPLE = b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
RETRY_AFTER = str(DatabaseUnavailable.retry_after)


@pytest.fixture
async def relay(home: object, postgres_server: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Relay]:
    """The way to the database of this test, which is on PostgreSQL."""
    url = make_url(await new_postgres_database(postgres_server))
    assert url.port
    async with running_relay(url.port) as relay:
        relayed = url.set(port=relay.port).render_as_string(hide_password=False)
        monkeypatch.setenv("FORGEARR_DATABASE__URL", relayed)
        get_settings.cache_clear()
        get_database.cache_clear()
        rate_limits.limiter.cache_clear()
        yield relay
        await get_database().close()
    await drop_postgres_database(url.render_as_string(hide_password=False))


@pytest.fixture
async def api(relay: Relay, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiClient]:
    """With rate limits, which look at the credential before the route does."""
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "true")
    for limit in ("GENERAL", "HEALTH", "CONTENT", "AUDIT", "APPLY", "RECOMMENDATIONS"):
        monkeypatch.setenv(f"FORGEARR_LIMITS__{limit}", "100000/minute")
    get_settings.cache_clear()
    users = await add_users(get_database())
    api = ApiClient(create_app(), get_database(), users)
    async with api.http:
        yield api


@pytest.fixture
async def open_client(relay: Relay) -> AsyncIterator[httpx.AsyncClient]:
    """Of a server that needs no credential, so that the route is the first to need the database."""
    transport = httpx.ASGITransport(create_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=TIMEOUT) as client:
        yield client


async def test_every_route_that_needs_a_credential_is_503(api: ApiClient, relay: Relay) -> None:
    await relay.cut()
    routes = [
        (mount.envelope, method, route.path_format.replace("{", "").replace("}", ""))
        for mount in MOUNTS
        for route in mount.routes
        if isinstance(route, APIRoute) and access_of(route) in {"user", "admin"}
        for method in methods_of(route)
    ]
    assert {envelope for envelope, *_ in routes} == {"native", "openai", "ollama"}
    for envelope, method, path in routes:
        response = await api.request("admin", method, path, content=b"{}")
        assert (response.status_code, response.headers["retry-after"]) == (503, RETRY_AFTER), (method, path)
        if method != "HEAD":
            check_envelope(response, envelope)
    await relay.restore()
    assert (await api.request("ada", "GET", "/api/v1/jobs")).status_code == 200


async def test_public_routes_are_503(api: ApiClient, relay: Relay, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "CACHE_SECONDS", 0)
    login = {"email": "nobody@example.com", "password": "-"}
    refresh = {"refresh_token": "refresh_x"}
    credential = {"Authorization": f"Bearer {identity.create_access_token(api.users['ada'])}"}
    requests: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/api/v1/auth/login", {"json": login}),
        ("POST", "/api/v1/auth/refresh", {"json": refresh}),
        ("POST", "/api/v1/auth/logout", {"json": refresh}),
        ("POST", "/webhooks/github", {"json": {}}),
        ("GET", "/metrics", {}),
        ("GET", "/metrics", {"headers": credential}),
    ]
    expected = [401, 401, 204, 401, 200, 200]
    assert [
        (await api.http.request(method, path, **options)).status_code for method, path, options in requests
    ] == expected
    await relay.cut()
    for method, path, options in requests:
        response = await api.http.request(method, path, **options)
        assert (response.status_code, response.headers["retry-after"]) == (503, RETRY_AFTER), (method, path)
        check_envelope(response, "native")
    for headers in ({}, credential):
        response = await api.http.get("/health", headers=headers)
        assert (response.status_code, response.headers["retry-after"]) == (503, RETRY_AFTER)
        assert Health.model_validate(response.json()).database == "disconnected"
        assert (await api.http.get("/api/v1/ping", headers=headers)).status_code == 200
    await relay.restore()
    assert [
        (await api.http.request(method, path, **options)).status_code for method, path, options in requests
    ] == expected


async def test_routes_of_a_server_without_credentials_are_503(open_client: httpx.AsyncClient, relay: Relay) -> None:
    chat = {"model": "forgearr/tiny", "messages": [{"role": "user", "content": "Hello"}]}
    continuation = {"model": "forgearr/tiny", "input": "Hello", "previous_response_id": "resp_x"}
    requests: list[tuple[str, str, str, dict[str, Any]]] = [
        ("native", "GET", "/api/v1/jobs", {}),
        ("native", "POST", "/api/v1/jobs", {"json": {"kind": "probe"}}),
        ("native", "GET", "/api/v1/jobs/x/events?follow=true", {}),
        ("native", "GET", "/api/training/sessions", {}),
        ("native", "POST", "/api/v1/datasets?name=x", {"content": SAMPLE}),
        ("native", "GET", "/api/services", {}),
        ("native", "GET", "/api/v1/settings", {}),
        ("openai", "GET", "/v1/files", {}),
        ("openai", "POST", "/v1/files", {"files": {"file": b"x"}, "data": {"purpose": "user_data"}}),
        ("openai", "GET", "/v1/batches", {}),
        ("openai", "GET", "/v1/responses/resp_x", {}),
        ("openai", "POST", "/v1/responses", {"json": continuation}),
        ("openai", "POST", "/v1/chat/completions", {"json": {**chat, "model": "ft:forgearr/tiny::x"}}),
        ("ollama", "POST", "/api/chat", {"json": {**chat, "model": "ft:forgearr/tiny::x"}}),
    ]
    await relay.cut()
    for envelope, method, path, options in requests:
        response = await open_client.request(method, path, **options)
        assert (response.status_code, response.headers.get("retry-after")) == (503, RETRY_AFTER), (path, response.text)
        check_envelope(response, envelope)
    await relay.restore()
    for _, method, path, options in requests:
        assert (await open_client.request(method, path, **options)).status_code < 500, path


async def test_sockets_are_refused_with_503(api: ApiClient, relay: Relay) -> None:
    paths = [
        route.path_format.format(client_id="client-1", training_id="x")
        for mount in MOUNTS
        for route in mount.routes
        if isinstance(route, APIWebSocketRoute)
    ]
    assert len(paths) >= 4
    token = identity.create_access_token(api.users["admin"])
    await relay.cut()
    for path in paths:
        refused = await shake_hands(api.app, path, token)
        assert (refused["status"], dict(refused["headers"])[b"retry-after"]) == (503, RETRY_AFTER.encode())


async def test_an_open_socket_is_told_to_connect_again(relay: Relay) -> None:
    async with running_app() as address, connect(f"ws://{address}/ws/client-1", **WEBSOCKET_OPTIONS) as socket:
        await relay.cut()
        await socket.send('{"type": "ping"}')
        assert json.loads(await socket.recv()) == {"type": "pong"}
        await socket.send('{"type": "join_room", "room": "job:job_x"}')
        with pytest.raises(ConnectionClosedError) as closed:
            await socket.recv()
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (
            1013,
            "The database does not respond. Connect again.",
        )
        await relay.restore()
        async with connect(f"ws://{address}/ws/client-1", **WEBSOCKET_OPTIONS) as again:
            await again.send('{"type": "join_room", "room": "job:job_x"}')
            assert json.loads(await again.recv())["type"] == "error"


async def test_a_followed_journal_goes_on_when_the_database_is_back(
    api: ApiClient, relay: Relay, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_events, "HEARTBEAT_SECONDS", 0.05)
    monkeypatch.setattr(job_events, "RETRY_SECONDS", 0.05)
    job_id = await api.queue_job("probe", {})
    headers = {"Authorization": f"Bearer {identity.create_access_token(api.users['ada'])}"}
    lines: list[str] = []

    async def read(address: str) -> None:
        url = f"http://{address}/api/v1/jobs/{job_id}/events?follow=true"
        async with httpx.AsyncClient(timeout=TIMEOUT) as client, client.stream("GET", url, headers=headers) as response:
            async for line in response.aiter_lines():
                lines.append(line)

    async with running_app(api.app) as address:
        reading = asyncio.create_task(read(address))
        await eventually_async(lambda: "event: queued" in lines)
        await relay.cut()
        await eventually_async(lambda: any("the database does not respond" in line for line in lines))
        await relay.restore()
        await api.update_job(job_id, state=State.SUCCEEDED)
        await reading
    assert lines.count("event: queued") == 1


def check_envelope(response: httpx.Response, envelope: str) -> None:
    body = response.json()
    if envelope == "openai":
        error = OpenAIErrorEnvelope.model_validate(body).error
        assert (error.type, error.code) == ("server_error", "database_unavailable")
        return
    native = ErrorEnvelope.model_validate(body)
    assert native.error_code == "DATABASE_UNAVAILABLE"
    assert native.error == (native.message if envelope == "ollama" else "service_unavailable")


async def shake_hands(app: FastAPI, path: str, token: str) -> Message:
    """The first message that a client gets which wants a WebSocket."""
    scope = {
        "type": "websocket",
        "path": path,
        "scheme": "wss",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {token}".encode())],
        "client": ("192.0.2.1", 40000),
        "extensions": {"websocket.http.response": {}},
    }
    sent: list[Message] = []

    async def receive() -> Message:
        return {"type": "websocket.connect"}

    async def send(message: Message) -> None:
        sent.append(message)

    await app(scope, receive, send)
    return sent[0]
