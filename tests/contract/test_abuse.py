"""What no client in its right mind sends: each is answered with a sentence, never with a 500, and leaves no damage."""

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

ODD_WORDS = [
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
AT_THE_ENDS_OF_THE_CALENDAR = {
    "0001-01-01T00:00:00Z": True,
    "0001-01-01T00:00:00+14:00": False,
    "1969-12-31T23:59:60Z": False,
    "9999-12-31T23:59:59.999999Z": True,
    "9999-12-31T23:59:59-14:00": False,
}
UNKEEPABLE = ["1e400", "-1e400", "NaN", "Infinity", "1" * 400, "1" * 5000, '"\\ud800"', '"\\u0000"', "[" * 100_000]
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
SENSELESS = [
    b"",
    b"\x00\xff",
    "no JSON",
    "[]",
    "1e400",
    "[" * 100_000,
    '{"type": []}',
    '{"type": {}, "room": "jobs"}',
    '{"type": "join_room"}',
    '{"type": "join_room", "room": ["jobs"]}',
    '{"type": "join_room", "room": ""}',
    '{"type": "join_room", "room": "*"}',
    '{"type": "join_room", "room": "job:\'; --"}',
    '{"type": "join_room", "room": "job:\\u0000"}',
    json.dumps({"type": "join_room", "room": "job:" + "x" * 100_000}),
]
NIGHTLY = {"name": "nightly", "kind": "probe", "cron": "0 3 * * *"}


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        yield client


# Addresses


async def test_a_word_that_is_no_id_names_nothing(client: httpx.AsyncClient) -> None:
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
    for word in ODD_WORDS:
        for method, path, body in routes:
            answer = await client.request(method, path.format(word), json=body)
            assert answer.status_code in {404, 422}, (word, answer.text)
            assert answer.json()["status"] == "error"
        for parameter in ("state", "kind", "parent_id", "created_after", "created_before", "skip", "limit"):
            answer = await client.get(f"/api/v1/jobs?{parameter}={word}")
            assert answer.status_code in {200, 422}, (word, answer.text)


async def test_a_page_that_cannot_be_is_refused(client: httpx.AsyncClient) -> None:
    for path in ("/api/v1/jobs", "/api/v1/schedules", "/api/v1/auth/keys"):
        for query in ("skip=-1", "limit=0", "limit=-5", "limit=101", f"skip={2**63}", f"skip={10**400}", "limit="):
            assert (await client.get(f"{path}?{query}")).status_code == 422, query
        assert (await client.get(f"{path}?skip=2147483647")).json()["items"] == []


async def test_times_at_the_ends_of_the_calendar(client: httpx.AsyncClient) -> None:
    for moment, is_one in AT_THE_ENDS_OF_THE_CALENDAR.items():
        made = await client.post("/api/v1/jobs", json={"kind": "probe", "run_after": moment})
        assert made.status_code == (201 if is_one else 422), (moment, made.text)
        for parameter in ("created_after", "created_before"):
            answer = await client.get("/api/v1/jobs", params={parameter: moment})
            assert answer.status_code == (200 if is_one else 422), (moment, answer.text)


async def test_a_time_is_written_out_with_its_zone(client: httpx.AsyncClient) -> None:
    for moment in (60, 0, 1e12, "60", "12:00:00Z", "2026-11-21", "2026-11-21T08:00:00", "now", True):
        answer = await client.post("/api/v1/jobs", json={"kind": "probe", "run_after": moment})
        assert (answer.status_code, list(answer.json()["details"])) == (422, ["run_after"]), moment


# Bodies


async def test_json_that_no_database_keeps_is_refused(client: httpx.AsyncClient) -> None:
    for payload in UNKEEPABLE:
        for content_type in ("application/json", "APPLICATION/JSON; charset=utf-8", "application/a~b+problem+json"):
            body = f'{{"kind": "probe", "spec": {{"payload": {payload}}}}}'
            answer = await client.post("/api/v1/jobs", content=body, headers={"Content-Type": content_type})
            assert answer.status_code == 400, (payload[:20], answer.text)
    assert (await client.get("/api/v1/jobs")).json()["total"] == 0


async def test_two_content_types_do_not_hide_the_body(client: httpx.AsyncClient) -> None:
    body = b'{"kind": "probe", "spec": {"payload": "\\u0000"}}'
    for types in (["application/json", "text/plain"], ["text/plain", "application/json"]):
        headers = [("Content-Type", content_type) for content_type in types]
        answer = await client.post("/api/v1/jobs", content=body, headers=headers)
        assert answer.status_code == 400, answer.text


async def test_odd_values_come_back_as_they_were(client: httpx.AsyncClient) -> None:
    for payload in (2**53, 2**63, -(2**63), 2**64 - 1, 5e-324, -0.0, "💥" * 1000, {"": {"": []}}):
        made = await client.post("/api/v1/jobs", json={"kind": "probe", "spec": {"payload": payload}})
        assert made.status_code == 201, made.text
        shown = await client.get(f"/api/v1/jobs/{made.json()['id']}")
        assert shown.json()["spec"]["payload"] == payload


async def test_deep_json_is_kept_or_refused(client: httpx.AsyncClient) -> None:
    for depth, leaf, status in ((90, "1", 201), (300, "1", 400), (1020, "1", 400), (1020, '"\\u0000"', 400)):
        for opening, closing in (("[", "]"), ('{"a":', "}")):
            payload = opening * depth + leaf + closing * depth
            body = f'{{"kind": "probe", "spec": {{"payload": {payload}}}}}'
            headers = {"Content-Type": "application/json", "Idempotency-Key": f"{depth}{opening}"}
            answer = await client.post("/api/v1/jobs", content=body, headers=headers)
            assert answer.status_code == status, answer.text
    listed = await client.get("/api/v1/jobs")
    assert (listed.status_code, listed.json()["total"]) == (200, 2)


async def test_a_spec_has_a_size(client: httpx.AsyncClient) -> None:
    for path, request in (("/api/v1/jobs", {"kind": "probe"}), ("/api/v1/schedules", NIGHTLY)):
        for size, status in ((900_000, 201), (1_100_000, 422)):
            answer = await client.post(path, json={**request, "spec": {"payload": "x" * size}})
            assert answer.status_code == status


async def test_resources_that_no_node_could_have_are_refused(client: httpx.AsyncClient) -> None:
    for resources in IMPOSSIBLE_RESOURCES:
        answer = await client.post("/api/v1/jobs", json={"kind": "probe", "resources": resources})
        assert answer.status_code == 422, resources


# Headers


async def test_an_idempotency_key_has_a_length(client: httpx.AsyncClient) -> None:
    for key in ("", "x" * 201, "x" * 100_000):
        answer = await client.post("/api/v1/jobs", json={"kind": "probe"}, headers={"Idempotency-Key": key})
        assert answer.status_code == 422


async def test_an_odd_idempotency_key_works_like_any_other(client: httpx.AsyncClient) -> None:
    made: set[str] = set()
    for key in (b"x" * 200, b"\xff\xfe", b"'; --", "ключ".encode()):
        headers = [(b"Idempotency-Key", key)]
        answers = [await client.post("/api/v1/jobs", json={"kind": "probe"}, headers=headers) for _ in range(2)]
        assert [answer.status_code for answer in answers] == [201, 201]
        made |= {answer.json()["id"] for answer in answers}
    assert len(made) == 4


async def test_a_request_id_that_could_do_harm_is_replaced(client: httpx.AsyncClient) -> None:
    for wanted in (b"a b", b"x" * 129, b"<script>", b'a"b', b"a\r\nSet-Cookie: b=c", b"\xff", b""):
        answer = await client.get("/api/v1/ping", headers=[(b"X-Request-ID", wanted)])
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"]), wanted


# At the same moment


async def test_one_of_many_at_once_gets_the_name(client: httpx.AsyncClient) -> None:
    person = {"email": "ada@example.com", "username": "ada", "password": "correct horse"}
    answers = await at_once(*(client.post("/api/v1/auth/register", json=person) for _ in range(8)))
    assert answers == {201: 1, 409: 7}
    answers = await at_once(*(client.post("/api/v1/schedules", json=NIGHTLY) for _ in range(8)))
    assert answers == {201: 1, 409: 7}


async def test_many_schedules_want_the_same_name_at_once(client: httpx.AsyncClient) -> None:
    made = [await client.post("/api/v1/schedules", json={**NIGHTLY, "name": f"{number}"}) for number in range(6)]
    paths = [f"/api/v1/schedules/{answer.json()['id']}" for answer in made]
    assert await at_once(*(client.put(path, json=NIGHTLY) for path in paths)) == {200: 1, 409: 5}


async def test_one_of_many_at_once_deletes(client: httpx.AsyncClient) -> None:
    path = f"/api/v1/schedules/{(await client.post('/api/v1/schedules', json=NIGHTLY)).json()['id']}"
    assert await at_once(*(client.delete(path) for _ in range(6))) == {204: 1, 404: 5}

    login = {"email": "ada@example.com", "password": "correct horse"}
    await client.post("/api/v1/auth/register", json={**login, "username": "ada"})
    tokens = (await client.post("/api/v1/auth/login", json=login)).json()
    headers = {"Authorization": f"Bearer {tokens['access_token']}"}
    key = (await client.post("/api/v1/auth/keys", json={"name": "ci"}, headers=headers)).json()
    path = f"/api/v1/auth/keys/{key['id']}"
    assert await at_once(*(client.delete(path, headers=headers) for _ in range(6))) == {204: 1, 404: 5}


async def test_changing_what_is_being_deleted(client: httpx.AsyncClient) -> None:
    for _ in range(5):
        path = f"/api/v1/schedules/{(await client.post('/api/v1/schedules', json=NIGHTLY)).json()['id']}"
        answers = await at_once(client.put(path, json=NIGHTLY), client.delete(path), client.put(path, json=NIGHTLY))
        assert answers.keys() <= {200, 204, 404}
        assert answers[204] == 1


async def test_one_request_sent_many_times_at_once_makes_one_job(client: httpx.AsyncClient) -> None:
    headers = {"Idempotency-Key": "same"}
    asked = [client.post("/api/v1/jobs", json={"kind": "probe"}, headers=headers) for _ in range(10)]
    answers = await asyncio.gather(*asked)
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.json()["id"] for answer in answers}) == 1


async def test_everything_happens_to_one_job_at_once(client: httpx.AsyncClient) -> None:
    job = (await client.post("/api/v1/jobs", json={"kind": "probe"})).json()["id"]
    actions = ["cancel", "pause", "resume", "retry"] * 4
    answers = await at_once(*(client.post(f"/api/v1/jobs/{job}/{action}") for action in actions))
    assert answers.keys() <= {200, 409}


# Names


async def test_a_schedule_of_the_longest_name_fires(client: httpx.AsyncClient, database: Database) -> None:
    lengths = {}
    for length in (90, 91, 100, 101):
        answer = await client.post("/api/v1/schedules", json={**NIGHTLY, "name": "ß" * length})
        lengths[length] = answer.status_code
        if answer.status_code == 201:
            async with database.transaction() as session:
                schedule = await schedules.get(session, answer.json()["id"], LOCAL)
                schedule.next_fire_at = schedule.created_at
            async with database.transaction() as session:
                await schedules.fire_due(session)
    assert lengths == {90: 201, 91: 422, 100: 422, 101: 422}
    assert (await client.get("/api/v1/jobs")).json()["total"] == 1


# WebSockets


async def test_senseless_messages_are_answered_and_do_no_harm(database: Database) -> None:
    async with running_app() as address, connect(f"ws://{address}/ws/client-1", **WEBSOCKET_OPTIONS) as client:
        for message in SENSELESS:
            await client.send(message)
            assert json.loads(await client.recv())["type"] == "error", message
        await client.send(json.dumps({"type": "leave_room", "room": "*"}))
        assert json.loads(await client.recv())["type"] == "room_left"
        await client.send('{"type": "ping"}')
        assert json.loads(await client.recv()) == {"type": "pong"}


async def test_one_connection_cannot_be_in_rooms_without_end(database: Database, client: httpx.AsyncClient) -> None:
    made = [(await client.post("/api/v1/jobs", json={"kind": "probe"})).json()["id"] for _ in range(MAX_ROOMS + 5)]
    async with running_app() as address, connect(f"ws://{address}/ws/client-1", **WEBSOCKET_OPTIONS) as socket:
        answers = Counter[str]()
        for job in made:
            await socket.send(json.dumps({"type": "join_room", "room": f"job:{job}"}))
            answers[json.loads(await socket.recv())["type"]] += 1
    assert answers == {"room_joined": MAX_ROOMS, "error": 5}


async def test_many_idle_connections_are_no_burden(database: Database) -> None:
    async with running_app() as address, AsyncExitStack() as stack, httpx.AsyncClient(timeout=TIMEOUT) as client:
        opened = [connect(f"ws://{address}/ws/client-{number}", **WEBSOCKET_OPTIONS) for number in range(200)]
        sockets = [await stack.enter_async_context(connection) for connection in opened]
        assert (await client.get(f"http://{address}/api/v1/jobs")).status_code == 200
        for socket in sockets:
            await socket.send('{"type": "ping"}')
            assert json.loads(await socket.recv()) == {"type": "pong"}


async def at_once(*requests: Any) -> Counter[int]:
    answers = await asyncio.gather(*requests)
    return Counter(answer.status_code for answer in answers)
