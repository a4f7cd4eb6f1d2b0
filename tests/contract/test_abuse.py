"""Hostile and malformed requests: each gets a clear error, never a 500, and does no damage."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest
from websockets.asyncio.client import connect

from cluster.db import Database
from cluster.ownership import LOCAL
from jobs import schedules
from serve.app import create_app
from serve.realtime.routes import MAX_ROOMS
from tests.support.app_server import running_app
from tests.support.waiting import TIMEOUT, WEBSOCKET_OPTIONS

INVALID_IDS = [
    "'; DROP TABLE jobs; --",
    "..%2F..%2Fetc%2Fpasswd",
    "%25%27%20OR%201=1",
    "%F0%9D%94%98",
    "%E2%80%AE",
    "%FF%FE",
    "%ED%A0%80",
    "%0d%0aSet-Cookie:%20a=b",
    "x" * 5000,
    "-1",
    "9" * 400,
    "00000000-0000-0000-0000-000000000000",
]
EXTREME_TIMES = {
    "0001-01-01T00:00:00Z": True,
    "0001-01-01T00:00:00+14:00": False,
    "1969-12-31T23:59:60Z": False,
    "9999-12-31T23:59:59.999999Z": True,
    "9999-12-31T23:59:59-14:00": False,
}
UNSTORABLE_VALUES = [
    "1e400",
    "-1e400",
    "NaN",
    "Infinity",
    "1" * 400,
    "1" * 5000,
    '"\\ud800"',
    '"\\u0000"',
    "[" * 100_000,
]
IMPOSSIBLE_RESOURCES: list[dict[str, Any]] = [
    {"cpus": 1e-9},
    {"gpus": 1e-9},
    {"gpus": 1.5},
    {"cpus": -1},
    {"memory_mb": 10**18},
    {"labels": {"zone": "x" * 1000}},
    {"labels": {"x" * 1000: "a"}},
    {"labels": {str(number): "a" for number in range(1000)}},
    {"labels": {"": ""}},
    {"labels": {"zone": "!in(a)"}},
    {"labels": {"zone": None}},
]
INVALID_MESSAGES = [
    b"",
    b"\x00\xff",
    "no JSON",
    "[]",
    "1e400",
    "[" * 10_000,
    '{"type": []}',
    '{"type": {}, "room": "jobs"}',
    '{"type": "join_room"}',
    '{"type": "join_room", "room": ["jobs"]}',
    '{"type": "join_room", "room": ""}',
    '{"type": "join_room", "room": "*"}',
    '{"type": "join_room", "room": "job:\'; --"}',
    '{"type": "join_room", "room": "job:\\u0000"}',
    json.dumps({"type": "join_room", "room": "job:" + "x" * 10_000}),
]
NIGHTLY = {"name": "nightly", "kind": "probe", "cron": "0 3 * * *"}


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        yield client


# Paths and queries


async def test_invalid_ids_are_not_found(client: httpx.AsyncClient) -> None:
    routes = [
        ("GET", "/api/v1/jobs/{}", None),
        ("GET", "/api/v1/jobs/{}/events", None),
        ("GET", "/api/v1/jobs/{}/logs?follow=1", None),
        ("POST", "/api/v1/jobs/{}/cancel", None),
        ("GET", "/api/v1/schedules/{}", None),
        ("PUT", "/api/v1/schedules/{}", NIGHTLY),
        ("DELETE", "/api/v1/schedules/{}", None),
        ("DELETE", "/api/v1/auth/keys/{}", None),
    ]
    for identifier in INVALID_IDS:
        for method, path, body in routes:
            response = await client.request(method, path.format(identifier), json=body)
            assert response.status_code in {404, 422}, (identifier, response.text)
            assert response.json()["status"] == "error"
        for parameter in ("state", "kind", "parent_id", "created_after", "created_before", "skip", "limit"):
            response = await client.get(f"/api/v1/jobs?{parameter}={identifier}")
            assert response.status_code in {200, 422}, (identifier, response.text)


async def test_invalid_pagination_is_refused(client: httpx.AsyncClient) -> None:
    for path in ("/api/v1/jobs", "/api/v1/schedules", "/api/v1/auth/keys"):
        for query in ("skip=-1", "limit=0", "limit=-5", "limit=101", f"skip={2**63}", f"skip={10**400}", "limit="):
            assert (await client.get(f"{path}?{query}")).status_code == 422, query
        assert (await client.get(f"{path}?skip=2147483647")).json()["items"] == []


async def test_extreme_times_are_accepted_or_refused(client: httpx.AsyncClient) -> None:
    for moment, is_valid in EXTREME_TIMES.items():
        created = await client.post("/api/v1/jobs", json={"kind": "probe", "run_after": moment})
        assert created.status_code == (201 if is_valid else 422), (moment, created.text)
        for parameter in ("created_after", "created_before"):
            response = await client.get("/api/v1/jobs", params={parameter: moment})
            assert response.status_code == (200 if is_valid else 422), (moment, response.text)


async def test_an_ambiguous_time_is_refused(client: httpx.AsyncClient) -> None:
    for moment in (60, 0, 1e12, "60", "12:00:00Z", "2026-11-21", "2026-11-21T08:00:00", "now", True):
        response = await client.post("/api/v1/jobs", json={"kind": "probe", "run_after": moment})
        assert (response.status_code, list(response.json()["details"])) == (422, ["run_after"]), moment


# Bodies


async def test_json_that_cannot_be_stored_is_refused(client: httpx.AsyncClient) -> None:
    for payload in UNSTORABLE_VALUES:
        for content_type in ("application/json", "APPLICATION/JSON; charset=utf-8", "application/a~b+problem+json"):
            body = f'{{"kind": "probe", "spec": {{"payload": {payload}}}}}'
            response = await client.post("/api/v1/jobs", content=body, headers={"Content-Type": content_type})
            assert response.status_code == 400, (payload[:20], response.text)
    assert (await client.get("/api/v1/jobs")).json()["total"] == 0


async def test_two_content_types_do_not_hide_the_body(client: httpx.AsyncClient) -> None:
    body = b'{"kind": "probe", "spec": {"payload": "\\u0000"}}'
    for types in (["application/json", "text/plain"], ["text/plain", "application/json"]):
        headers = [("Content-Type", content_type) for content_type in types]
        response = await client.post("/api/v1/jobs", content=body, headers=headers)
        assert response.status_code == 400, response.text


async def test_unusual_values_are_preserved(client: httpx.AsyncClient) -> None:
    for payload in (2**53, 2**63, -(2**63), 2**64 - 1, 5e-324, -0.0, "💥" * 1000, {"": {"": []}}):
        created = await client.post("/api/v1/jobs", json={"kind": "probe", "spec": {"payload": payload}})
        assert created.status_code == 201, created.text
        stored = await client.get(f"/api/v1/jobs/{created.json()['id']}")
        assert stored.json()["spec"]["payload"] == payload


async def test_deep_json_is_stored_or_refused(client: httpx.AsyncClient) -> None:
    for depth, leaf, status in ((90, "1", 201), (300, "1", 400), (1020, "1", 400), (1020, '"\\u0000"', 400)):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            payload = opening * depth + leaf + closing * depth
            body = f'{{"kind": "probe", "spec": {{"payload": {payload}}}}}'
            headers = {"Content-Type": "application/json", "Idempotency-Key": f"{depth}{opening}"}
            response = await client.post("/api/v1/jobs", content=body, headers=headers)
            assert response.status_code == status, response.text
    listed = await client.get("/api/v1/jobs")
    assert (listed.status_code, listed.json()["total"]) == (200, 2)


async def test_a_spec_has_a_maximum_size(client: httpx.AsyncClient) -> None:
    for path, request in (("/api/v1/jobs", {"kind": "probe"}), ("/api/v1/schedules", NIGHTLY)):
        for size, status in ((900_000, 201), (1_100_000, 422)):
            response = await client.post(path, json={**request, "spec": {"payload": "x" * size}})
            assert response.status_code == status


async def test_impossible_resources_are_refused(client: httpx.AsyncClient) -> None:
    for resources in IMPOSSIBLE_RESOURCES:
        response = await client.post("/api/v1/jobs", json={"kind": "probe", "resources": resources})
        assert response.status_code == 422, resources


# Headers


async def test_an_idempotency_key_has_a_maximum_length(client: httpx.AsyncClient) -> None:
    for key in ("", "x" * 201, "x" * 100_000):
        response = await client.post("/api/v1/jobs", json={"kind": "probe"}, headers={"Idempotency-Key": key})
        assert response.status_code == 422


async def test_unusual_idempotency_keys_work(client: httpx.AsyncClient) -> None:
    ids: set[str] = set()
    for key in (b"x" * 200, b"\xff\xfe", b"'; --", "ключ".encode()):
        headers = [(b"Idempotency-Key", key)]
        responses = [await client.post("/api/v1/jobs", json={"kind": "probe"}, headers=headers) for _ in range(2)]
        assert [response.status_code for response in responses] == [201, 201]
        ids |= {response.json()["id"] for response in responses}
    assert len(ids) == 4


async def test_a_malicious_request_id_is_replaced(client: httpx.AsyncClient) -> None:
    for request_id in (b"a b", b"x" * 129, b"<script>", b'a"b', b"a\r\nSet-Cookie: b=c", b"\xff", b""):
        response = await client.get("/api/v1/ping", headers=[(b"X-Request-ID", request_id)])
        assert re.fullmatch("[0-9a-f]{32}", response.headers["X-Request-ID"]), request_id


# Simultaneous requests


async def test_a_name_is_taken_once_by_simultaneous_requests(client: httpx.AsyncClient) -> None:
    person = {"email": "ada@example.com", "username": "ada", "password": "correct horse"}
    statuses = await count_statuses(*(client.post("/api/v1/auth/register", json=person) for _ in range(8)))
    assert statuses == {201: 1, 409: 7}
    statuses = await count_statuses(*(client.post("/api/v1/schedules", json=NIGHTLY) for _ in range(8)))
    assert statuses == {201: 1, 409: 7}


async def test_one_of_several_schedules_gets_a_name(client: httpx.AsyncClient) -> None:
    created = [await client.post("/api/v1/schedules", json={**NIGHTLY, "name": f"{number}"}) for number in range(6)]
    paths = [f"/api/v1/schedules/{response.json()['id']}" for response in created]
    assert await count_statuses(*(client.put(path, json=NIGHTLY) for path in paths)) == {200: 1, 409: 5}


async def test_one_of_simultaneous_deletions_succeeds(client: httpx.AsyncClient) -> None:
    path = f"/api/v1/schedules/{(await client.post('/api/v1/schedules', json=NIGHTLY)).json()['id']}"
    assert await count_statuses(*(client.delete(path) for _ in range(6))) == {204: 1, 404: 5}

    login = {"email": "ada@example.com", "password": "correct horse"}
    await client.post("/api/v1/auth/register", json={**login, "username": "ada"})
    tokens = (await client.post("/api/v1/auth/login", json=login)).json()
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    key = (await client.post("/api/v1/auth/keys", json={"name": "ci"}, headers=headers)).json()
    path = f"/api/v1/auth/keys/{key['id']}"
    assert await count_statuses(*(client.delete(path, headers=headers) for _ in range(6))) == {204: 1, 404: 5}


async def test_simultaneous_update_and_deletion(client: httpx.AsyncClient) -> None:
    for _ in range(5):
        path = f"/api/v1/schedules/{(await client.post('/api/v1/schedules', json=NIGHTLY)).json()['id']}"
        statuses = await count_statuses(
            client.put(path, json=NIGHTLY), client.delete(path), client.put(path, json=NIGHTLY)
        )
        assert statuses.keys() <= {200, 204, 404}
        assert statuses[204] == 1


async def test_simultaneous_requests_with_one_idempotency_key_make_one_job(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "same"}
    requests = [client.post("/api/v1/jobs", json={"kind": "probe"}, headers=headers) for _ in range(10)]
    responses = await asyncio.gather(*requests)
    assert {response.status_code for response in responses} == {201}
    assert len({response.json()["id"] for response in responses}) == 1


async def test_simultaneous_actions_on_a_job_cause_no_server_error(client: httpx.AsyncClient) -> None:
    job = (await client.post("/api/v1/jobs", json={"kind": "probe"})).json()["id"]
    actions = ["cancel", "pause", "resume", "retry"] * 4
    statuses = await count_statuses(*(client.post(f"/api/v1/jobs/{job}/{action}") for action in actions))
    assert statuses.keys() <= {200, 409}


# Names


async def test_a_schedule_with_the_longest_name_fires(client: httpx.AsyncClient, database: Database) -> None:
    lengths = {}
    for length in (90, 91, 100, 101):
        response = await client.post("/api/v1/schedules", json={**NIGHTLY, "name": "ß" * length})
        lengths[length] = response.status_code
        if response.status_code == 201:
            async with database.transaction() as session:
                schedule = await schedules.get(session, response.json()["id"], LOCAL)
                schedule.next_fire_at = schedule.created_at
            async with database.transaction() as session:
                await schedules.fire_due(session)
    assert lengths == {90: 201, 91: 422, 100: 422, 101: 422}
    assert (await client.get("/api/v1/jobs")).json()["total"] == 1


# WebSockets


async def test_invalid_messages_get_an_error_and_do_no_harm(database: Database) -> None:
    async with running_app() as address, connect(f"ws://{address}/ws/client-1", **WEBSOCKET_OPTIONS) as client:
        for message in INVALID_MESSAGES:
            await client.send(message)
            assert json.loads(await client.recv())["type"] == "error", message
        await client.send(json.dumps({"type": "leave_room", "room": "*"}))
        assert json.loads(await client.recv())["type"] == "room_left"
        await client.send('{"type": "ping"}')
        assert json.loads(await client.recv()) == {"type": "pong"}


async def test_a_connection_has_a_maximum_number_of_rooms(database: Database, client: httpx.AsyncClient) -> None:
    jobs = [(await client.post("/api/v1/jobs", json={"kind": "probe"})).json()["id"] for _ in range(MAX_ROOMS + 5)]
    async with running_app() as address, connect(f"ws://{address}/ws/client-1", **WEBSOCKET_OPTIONS) as socket:
        types = Counter[str]()
        for job in jobs:
            await socket.send(json.dumps({"type": "join_room", "room": f"job:{job}"}))
            types[json.loads(await socket.recv())["type"]] += 1
    assert types == {"room_joined": MAX_ROOMS, "error": 5}


async def test_many_idle_connections_are_supported(database: Database) -> None:
    async with running_app() as address, AsyncExitStack() as stack, httpx.AsyncClient(timeout=TIMEOUT) as client:
        opened = [connect(f"ws://{address}/ws/client-{number}", **WEBSOCKET_OPTIONS) for number in range(200)]
        sockets = [await stack.enter_async_context(connection) for connection in opened]
        assert (await client.get(f"http://{address}/api/v1/jobs")).status_code == 200
        for socket in sockets:
            await socket.send('{"type": "ping"}')
            assert json.loads(await socket.recv()) == {"type": "pong"}


async def count_statuses(*requests: Any) -> Counter[int]:
    responses = await asyncio.gather(*requests)
    return Counter(response.status_code for response in responses)
