"""Hubs and WebSockets: the delivery of messages to rooms, and clients that do not read."""

import asyncio
import base64
import json
import os
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import pytest
import uvicorn
from fastapi import FastAPI
from starlette.websockets import WebSocketState
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosedError, InvalidStatus

from cluster import events, identity, logs, ownership
from cluster.db import Database, now
from cluster.ownership import LOCAL
from cluster.secrets import signing_key
from cluster.services import health_checks
from cluster.services import store as service_store
from cluster.settings import get_settings
from jobs import queue
from serve.app import create_app
from serve.jobs import events as jobs_events
from serve.realtime import feeds
from serve.realtime import hub as realtime_hub
from serve.realtime.feeds import follow_events
from serve.realtime.hub import Hub, Message
from tests.support.services.fake_services import FAKE_SERVICES, KEY
from tests.support.services.stub_server import StubResponse, stub_server
from tests.support.waiting import TIMEOUT, WEBSOCKET_OPTIONS

TOO_LONG = realtime_hub.MAX_FRAME_LENGTH + 1


def message(room: str, number: int = 0, **data: Any) -> events.Message:
    return {"rooms": [room], "type": "test", "data": {"number": number, **data}, "timestamp": "2026-01-01T00:00:00Z"}


@pytest.fixture
def actor() -> events.Events:
    """The events actor, in this process."""
    return events.Events()


@pytest.fixture
def hub(actor: events.Events) -> Hub:
    return new_hub(actor)


def new_hub(actor: events.Events) -> Hub:
    return Hub(lambda: follow_events(lambda cursor: actor.poll(cursor, TIMEOUT)))


# Hubs


async def test_a_subscription_receives_its_rooms_only(hub: Hub, actor: events.Events) -> None:
    async with hub.subscribe({"a"}) as subscription:
        subscription.join("b")
        await actor.publish([message("c", 1), message("a", 2), message("b", 3)])
        assert [await receive_number(subscription), await receive_number(subscription)] == [2, 3]
        subscription.leave("a")
        await actor.publish([message("a", 4), message("b", 5)])
        assert await receive_number(subscription) == 5


async def test_a_message_for_two_rooms_is_received_once(hub: Hub, actor: events.Events) -> None:
    async with hub.subscribe({"a", "b"}) as subscription:
        await actor.publish([{**message("a", 1), "rooms": ["a", "b"]}, message("a", 2)])
        assert [await receive_number(subscription), await receive_number(subscription)] == [1, 2]


async def test_get_returns_none_after_its_timeout(hub: Hub) -> None:
    async with hub.subscribe({"a"}) as subscription:
        assert await subscription.get(timeout=0.01) is None
        assert not subscription.dropped


async def test_a_feed_runs_only_while_there_are_subscriptions() -> None:
    running = 0

    async def feed() -> AsyncGenerator[list[Message]]:
        nonlocal running
        running += 1
        try:
            while True:
                yield []
                await asyncio.sleep(0.001)
        finally:
            running -= 1

    hub = Hub(feed)
    assert running == 0
    for _ in range(2):
        async with hub.subscribe({"a"}), hub.subscribe({"b"}):
            assert running == 1
        await until(lambda: running == 0)


async def test_a_slow_subscription_is_dropped_and_others_miss_nothing(hub: Hub, actor: events.Events) -> None:
    async with hub.subscribe({"a"}) as idle, hub.subscribe({"a"}) as busy:
        for batch in batches(3 * realtime_hub.MAX_QUEUED_MESSAGES):
            await actor.publish([message("a", number) for number in batch])
            assert [await receive_number(busy) for _ in batch] == list(batch)
        assert (idle.dropped, busy.dropped) == (True, False)
        assert hub.listeners() == 1
        assert await idle.get(timeout=TIMEOUT) is None
        idle.put(message("a"))
        assert [message async for message in remaining(idle)] == []


async def test_a_replaced_actor_is_announced_as_missed_events(actor: events.Events) -> None:
    actors = [actor]
    hub = Hub(lambda: follow_events(lambda cursor: actors[-1].poll(cursor, 0.01)))
    async with hub.subscribe({"a"}) as subscription:
        actors.append(events.Events())
        await actors[-1].publish([message("a", 1)])
        missed = await subscription.get(timeout=TIMEOUT)
        assert missed is not None
        assert missed["type"] == "events.missed"
        assert await receive_number(subscription) == 1


async def test_subscriptions_wait_for_an_unavailable_actor(
    actor: events.Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feeds, "RETRY_SECONDS", 0.01)
    away = True

    async def poll(cursor: events.Cursor | None) -> events.Batch:
        # Without Ray, events.poll raises Unavailable.
        return await (events.poll(cursor) if away else actor.poll(cursor, 0.01))

    hub = Hub(lambda: follow_events(poll))
    async with hub.subscribe({"a"}) as subscription:
        away = False
        missed = await subscription.get(timeout=TIMEOUT)
        assert missed is not None
        assert missed["type"] == "events.missed"


async def test_a_failed_feed_drops_its_subscriptions(caplog: pytest.LogCaptureFixture) -> None:
    async def feed() -> AsyncGenerator[list[Message]]:
        yield []
        raise OSError("the disk is gone")

    async with Hub(feed).subscribe({"a"}) as subscription:
        assert await subscription.get(timeout=TIMEOUT) is None
        assert subscription.dropped
    assert "the disk is gone" in caplog.text


# WebSockets


async def test_clients_join_and_leave_rooms(app: FastAPI, actor: events.Events) -> None:
    async with serving(app) as url, connect(f"{url}/ws/client-1", **WEBSOCKET_OPTIONS) as client:
        assert await send(client, type="ping") == {"type": "pong"}
        assert await send(client, type="join_room", room="downloads") == {"type": "room_joined", "room": "downloads"}
        await actor.publish([message("config_audit", 1), message("downloads", 2)])
        assert await receive(client) == {"type": "test", "data": {"number": 2}, "timestamp": "2026-01-01T00:00:00Z"}
        assert await send(client, type="leave_room", room="downloads") == {"type": "room_left", "room": "downloads"}
        assert await send(client, type="join_room", room="system") == {"type": "room_joined", "room": "system"}
        await actor.publish([message("downloads", 3), message("system", 4)])
        assert (await receive(client))["data"] == {"number": 4}


MESSAGES: list[tuple[str, str, dict[str, Any]]] = [
    ("config_audit", "config.audit.completed", {"audit_id": "audit_abc123", "recommendation_count": 8}),
    (
        "downloads",
        "download.failed",
        {"download_id": "SABnzbd_nzo_abc123", "title": "Movie.2024.1080p", "reason": "Incomplete download"},
    ),
    (
        "content_requests",
        "content.added",
        {"request_id": "req_456", "content_id": "123", "title": 'The "Matrix" 🎬', "type": "movie"},
    ),
    ("system", "service.unhealthy", {"service": "TV", "type": "sonarr", "error": "TV cannot be reached."}),
]


async def test_messages_of_services_reach_their_rooms_only(app: FastAPI, published: None) -> None:
    async with serving(app) as url, connect(f"{url}/ws/client-1", **WEBSOCKET_OPTIONS) as client:
        for room, kind, data in MESSAGES:
            assert (await send(client, type="join_room", room=room))["type"] == "room_joined"
            stamp = "2025-01-08T10:30:00Z"
            messages = [
                events.Message(rooms=[name], type=type_, data=data_, timestamp=stamp) for name, type_, data_ in MESSAGES
            ]
            events.publish(messages)
            assert await receive(client) == {"type": kind, "data": data, "timestamp": stamp}
            assert (await send(client, type="leave_room", room=room))["type"] == "room_left"


async def test_each_change_of_a_services_health_is_published_once(
    app: FastAPI, database: Database, published: None
) -> None:
    works = True
    sonarr = FAKE_SERVICES["sonarr"]
    async with (
        stub_server(lambda request: sonarr(request) if works else StubResponse(b"down", 503)) as server,
        serving(app) as url,
        connect(f"{url}/ws/client-1", **WEBSOCKET_OPTIONS) as client,
    ):
        async with database.transaction() as session:
            values = {"name": "TV 📺", "type": "sonarr", "url": server.url, "api_key": KEY}
            service = await service_store.create(session, values, "ada")
        assert (await send(client, type="join_room", room="system"))["type"] == "room_joined"
        received: list[dict[str, Any]] = []
        for state in (True, False, False, True, True, False):
            works = state
            await health_checks.check(database, service)
        for _ in range(3):
            received.append(await receive(client))
    assert [message["type"] for message in received] == ["service.unhealthy", "service.healthy", "service.unhealthy"]
    assert received[0].keys() == {"type", "data", "timestamp"}
    assert received[0]["timestamp"].endswith("Z")
    assert (received[0]["data"]["service"], received[0]["data"]["type"]) == ("TV 📺", "sonarr")
    assert ("503" in received[0]["data"]["error"], received[1]["data"]["error"]) == (True, None)


async def test_the_socket_of_a_forge_job_follows_its_steps(
    app: FastAPI, actor: events.Events, database: Database
) -> None:
    data = {"data": {"dataset": "demo/homelab"}}
    async with database.transaction() as session:
        forge = await queue.enqueue(session, queue.JobRequest(kind="forge", spec=data), LOCAL)
    async with serving(app) as url, connect(f"{url}/ws/training/{forge.id}", **WEBSOCKET_OPTIONS) as client:
        assert (await receive(client))["progress"] == 0
        async with database.transaction() as session:
            training = await queue.enqueue_child(session, forge, "fine_tune", "fine_tune", data)
        await actor.publish([message(f"job:{forge.id}")])  # as after it parks
        await receive(client)
        async with database.transaction() as session:
            (await queue.get(session, training.id, LOCAL)).progress = 50
        await actor.publish([message(f"job:{training.id}")])
        assert (await receive(client))["progress"] == 30


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "1",
        "{}",
        b"\xff",
        '{"type": "shout"}',
        '{"type": 1}',
        '{"type": "join_room"}',
        '{"type": "join_room", "room": 1}',
        '{"type": "join_room", "room": "*"}',
        '{"type": "join_room", "room": "cellar"}',
        '{"type": "join_room", "room": "job:no such job"}',
    ],
)
async def test_invalid_messages_get_an_error(app: FastAPI, content: str | bytes) -> None:
    async with serving(app) as url, connect(f"{url}/ws/client-1", **WEBSOCKET_OPTIONS) as client:
        await client.send(content)
        response = await receive(client)
        assert response["type"] == "error"
        assert response["message"]
        assert await send(client, type="ping") == {"type": "pong"}


async def test_a_connection_has_a_bounded_number_of_rooms(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.realtime.routes.MAX_ROOMS", 1)
    async with serving(app) as url, connect(f"{url}/ws/client-1", **WEBSOCKET_OPTIONS) as client:
        assert (await send(client, type="join_room", room="system"))["type"] == "room_joined"
        assert (await send(client, type="join_room", room="downloads"))["type"] == "error"


async def test_users_may_follow_only_their_own_jobs(app: FastAPI, database: Database, required: None) -> None:
    ada, ada_key = await add_user(database, "ada", "user")
    _, root_key = await add_user(database, "root", "admin")
    own = await add_job(database, ownership.Principal(id=ada.id, name="ada", is_admin=False))
    other = await add_job(database, ownership.LOCAL)
    rooms = ["jobs", f"job:{own}", f"job:{other}", "job:none", "downloads"]

    async def joined(key: str) -> list[str]:
        async with connect(f"{url}/ws/x", additional_headers={"X-API-Key": key}, **WEBSOCKET_OPTIONS) as client:
            responses = [await send(client, type="join_room", room=room) for room in rooms]
            return [response["room"] for response in responses if response["type"] == "room_joined"]

    async with serving(app) as url:
        assert await joined(ada_key) == [f"job:{own}", "downloads"]
        assert await joined(root_key) == ["jobs", f"job:{own}", f"job:{other}", "downloads"]


async def test_unauthorized_clients_are_refused_in_the_handshake(
    app: FastAPI, database: Database, required: None
) -> None:
    _, key = await add_user(database, "ada", "user")
    async with serving(app) as url:
        assert await refusal(f"{url}/ws/client-1") == (401, "UNAUTHORIZED")
        assert await refusal(f"{url}/ws/client-1?token=wrong") == (401, "UNAUTHORIZED")
        assert await refusal(f"{url}/ws/logs?token={key}") == (403, "FORBIDDEN")
        assert await refusal(f"{url}/ws/{'x' * 129}?token={key}") == (422, "VALIDATION_ERROR")
        async with connect(f"{url}/ws/system?token={key}", **WEBSOCKET_OPTIONS) as client:
            assert "cpu_percent" in await receive(client)


async def test_connections_end_when_their_credentials_become_invalid(
    app: FastAPI, database: Database, required: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realtime_hub, "AUTH_CHECK_SECONDS", 0.05)
    monkeypatch.setattr(jobs_events, "HEARTBEAT_SECONDS", 0.05)
    ada, key = await add_user(database, "ada", "user")
    bob, bobs = await add_user(database, "bob", "user")
    carol, carols = await add_user(database, "carol", "user")
    job = await add_job(database, ownership.Principal(id=bob.id, name="bob", is_admin=False))
    async with (
        serving(app) as url,
        await connect_until_expiry(url, ada) as expired,
        connect(f"{url}/ws/d?token={identity.create_access_token(carol)}", **WEBSOCKET_OPTIONS) as logged_out,
        connect(f"{url}/ws/e?token={carols}", **WEBSOCKET_OPTIONS) as logged_out_key,
        connect(f"{url}/ws/a?token={key}", **WEBSOCKET_OPTIONS) as revoked,
        connect(f"{url}/ws/b?token={identity.create_access_token(bob)}", **WEBSOCKET_OPTIONS) as disabled,
        connect(f"{url}/ws/c?token={identity.create_access_token(ada)}", **WEBSOCKET_OPTIONS) as unaffected,
        httpx.AsyncClient(base_url=url.replace("ws", "http"), headers={"X-API-Key": bobs}, timeout=TIMEOUT) as client,
        client.stream("GET", f"/api/v1/jobs/{job}/events", params={"follow": 1}) as events_of_job,
    ):
        assert events_of_job.status_code == 200
        async with database.transaction() as session:
            ((listed, _),) = await identity.list_keys(session, ada.id)
            await identity.revoke_key(session, listed.id)
            await identity.set_active(session, await identity.get_user(session, bob.email), active=False)
            await identity.end_all_credentials(session, await identity.get_user(session, carol.email))
        for excluded in (revoked, disabled, expired, logged_out, logged_out_key):
            with pytest.raises(ConnectionClosedError) as closed:
                await receive(excluded)
            assert closed.value.rcvd
            assert closed.value.rcvd.code == 1008
        async with asyncio.timeout(TIMEOUT):
            await events_of_job.aread()  # the stream ends
        assert await send(unaffected, type="ping") == {"type": "pong"}


@pytest.mark.parametrize("content", ["x" * TOO_LONG, b"x" * TOO_LONG])
async def test_a_message_that_is_too_long_ends_its_connection(app: FastAPI, content: str | bytes) -> None:
    longest = json.dumps({"type": "ping", "padding": ""})
    longest = longest.replace('""', f'"{"x" * (realtime_hub.MAX_FRAME_LENGTH - len(longest))}"')
    async with (
        serving(app) as url,
        connect(f"{url}/ws/a", **WEBSOCKET_OPTIONS) as client,
        connect(f"{url}/ws/b", **WEBSOCKET_OPTIONS) as other,
    ):
        await client.send(longest)
        assert await receive(client) == {"type": "pong"}
        await client.send(content)
        with pytest.raises(ConnectionClosedError) as closed:
            await receive(client)
        assert closed.value.rcvd
        assert closed.value.rcvd.code == realtime_hub.MESSAGE_TOO_BIG
        assert await send(other, type="ping") == {"type": "pong"}


async def test_a_page_of_another_origin_is_refused(app: FastAPI) -> None:
    async with serving(app) as url:
        assert await refusal(f"{url}/ws/client-1", Origin="https://evil.example") == (403, "CROSS_ORIGIN")


async def test_system_samples_are_sent(app: FastAPI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "SAMPLE_SECONDS", 0.05)
    async with serving(app) as url, connect(f"{url}/ws/system", **WEBSOCKET_OPTIONS) as client:
        first, second = await receive(client), await receive(client)
    assert first["timestamp"] < second["timestamp"]
    assert first["timestamp"].endswith("Z")
    for name in ("cpu_percent", "memory_percent", "disk_percent"):
        assert 0 <= first[name] <= 100


async def test_log_lines_are_sent(app: FastAPI, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "LOG_SECONDS", 0.01)
    path = logs.folder() / "worker.jsonl"
    path.write_text(line("from yesterday"))
    async with serving(app) as url, connect(f"{url}/ws/logs", **WEBSOCKET_OPTIONS) as client:
        assert await send(client, type="ping") == {"type": "pong"}
        with path.open("a") as file:
            file.write(line("one") + line("two")[:20])
            file.flush()
            assert (await receive(client))["message"] == "one"
            file.write(line("two")[20:])
        assert (await receive(client))["message"] == "two"
        path.replace(path.with_suffix(".jsonl.1"))
        path.write_text(line("3"))
        assert (await receive(client))["message"] == "3"
        (logs.folder() / "dispatcher.jsonl").write_text("broken\n" + line("four"))
        assert await receive(client) == {"timestamp": "2026-01-01T00:00:00Z", "level": "INFO", "message": "four"}


async def test_a_client_that_does_not_read_is_dropped_without_slowing_others(
    app: FastAPI, actor: events.Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(realtime_hub, "SEND_SECONDS", TIMEOUT)
    hub: Hub = app.state.hub
    async with serving(app) as url, connect(f"{url}/ws/quick", **WEBSOCKET_OPTIONS) as quick:
        assert (await send(quick, type="join_room", room="system"))["type"] == "room_joined"
        with await silent_client(url, {"type": "join_room", "room": "system"}):
            await until(lambda: hub.listeners("system") == 2)
            # More than all buffers between the two ends can hold.
            for batch in batches(3 * realtime_hub.MAX_QUEUED_MESSAGES):
                await actor.publish([message("system", number, padding="x" * 50_000) for number in batch])
                assert [(await receive(quick))["data"]["number"] for _ in batch] == list(batch)
            await until(lambda: hub.listeners() == 1)


async def test_a_blocked_connection_is_closed(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(realtime_hub, "SEND_SECONDS", 0.05)
    closed: list[int] = []

    async def wait_forever(*_: Any) -> Any:
        await asyncio.Event().wait()

    async def close(code: int, _: str) -> None:
        closed.append(code)

    state = WebSocketState.CONNECTED
    stuck: Any = SimpleNamespace(send_text=wait_forever, receive=wait_forever, close=close, application_state=state)
    async with asyncio.timeout(TIMEOUT), hub.subscribe(()) as subscription:
        subscription.put({"type": "news"})
        await realtime_hub.serve_socket(stuck, subscription, wait_forever)
    assert closed == [realtime_hub.TRY_AGAIN_LATER]


async def test_a_lost_connection_is_detected(app: FastAPI, actor: events.Events) -> None:
    hub: Hub = app.state.hub
    async with serving(app, ws_ping_interval=1.0, ws_ping_timeout=1.0) as url:
        with await silent_client(url, {"type": "join_room", "room": "system"}):
            await until(lambda: hub.listeners("system") == 1)
            await until(lambda: hub.listeners() == 0)


@pytest.fixture
def app(home: Path, actor: events.Events) -> FastAPI:
    """The whole application, with the events actor in this process."""
    app = create_app()
    app.state.hub = new_hub(actor)
    return app


@pytest.fixture
def published(actor: events.Events, monkeypatch: pytest.MonkeyPatch) -> None:
    """Published messages go to the actor in this process, as Ray would send them to the one in another process."""

    class Call:
        def __init__(self, task: asyncio.Task[None]) -> None:
            self.task = task

        def future(self) -> Future[None]:
            done = Future[None]()
            self.task.add_done_callback(lambda task: done.set_result(task.result()))
            return done

    class Method:
        def remote(self, messages: list[events.Message]) -> Call:
            return Call(asyncio.create_task(actor.publish(messages)))

    monkeypatch.setattr(events, "_no_lookup_before", 0.0)

    def find(name: str) -> object:
        return SimpleNamespace(publish=Method())

    monkeypatch.setattr(events, "find_actor", find)


@pytest.fixture
def required(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server requires a credential, as it does on any address but loopback."""
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    get_settings.cache_clear()


@asynccontextmanager
async def serving(app: FastAPI, **options: Any) -> AsyncGenerator[str]:
    """A real server on loopback; yields its WebSocket URL."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", **options))
    listener = socket.create_server(("127.0.0.1", 0))
    running = asyncio.create_task(server.serve([listener]))
    try:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        await running


async def silent_client(url: str, content: dict[str, str]) -> socket.socket:
    """A client that connects, sends one message, and then reads nothing, not even a ping."""
    address = url.removeprefix("ws://")
    host, _, port = address.partition(":")
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(client, (host, int(port)))
    key = base64.b64encode(os.urandom(16)).decode()
    await loop.sock_sendall(
        client,
        f"GET /ws/silent HTTP/1.1\r\nHost: {address}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n\r\n".encode(),
    )
    assert b" 101 " in await loop.sock_recv(client, 1024)
    payload = json.dumps(content).encode()
    # A client must mask its frames; a mask of zeros leaves the payload as it is.
    await loop.sock_sendall(client, bytes([0x81, 0x80 | len(payload), 0, 0, 0, 0]) + payload)
    return client


async def connect_until_expiry(url: str, user: identity.User) -> ClientConnection:
    """A connection whose access token expires soon, but not before it is open, however slow this machine is."""
    claims = jwt.decode(identity.create_access_token(user), signing_key(), algorithms=["HS256"])
    for seconds in (1, 2, 4, 8, 16, 32, 64):
        expiring = claims | {"exp": now() + timedelta(seconds=seconds)}
        token = jwt.encode(expiring, signing_key(), algorithm="HS256")
        with suppress(InvalidStatus):
            return await connect(f"{url}/ws/expiring?token={token}", **WEBSOCKET_OPTIONS)
    pytest.fail("a handshake takes longer than a minute")


async def send(client: ClientConnection, **fields: str) -> dict[str, Any]:
    await client.send(json.dumps(fields))
    return await receive(client)


async def receive(client: ClientConnection) -> dict[str, Any]:
    async with asyncio.timeout(TIMEOUT):
        return json.loads(await client.recv())


async def refusal(url: str, **headers: str) -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as caught:
        await connect(url, additional_headers=headers, **WEBSOCKET_OPTIONS)
    response = caught.value.response
    return response.status_code, json.loads(response.body)["error_code"]


async def receive_number(subscription: realtime_hub.Subscription) -> int:
    message = await subscription.get(timeout=TIMEOUT)
    assert message is not None
    return message["data"]["number"]


def batches(count: int) -> list[range]:
    return [range(start, start + 64) for start in range(0, count, 64)]


async def remaining(subscription: realtime_hub.Subscription) -> AsyncIterator[Message]:
    while (message := await subscription.get(timeout=0.01)) is not None:
        yield message


async def until(is_true: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT):
        while not is_true():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


async def add_user(database: Database, name: str, role: identity.Role) -> tuple[identity.User, str]:
    """A user, and a key of theirs."""
    async with database.transaction() as session:
        user = await identity.add_user(
            session, email=f"{name}@example.com", username=name, password_hash="-", role=role
        )
        await session.flush()
        _, key = await identity.create_key(session, user.id, "test")
    return user, key


async def add_job(database: Database, owner: ownership.Principal) -> str:
    async with database.transaction() as session:
        job = await queue.enqueue(session, queue.JobRequest(kind="probe"), owner)
    return job.id


def line(text: str) -> str:
    return json.dumps({"timestamp": "2026-01-01T00:00:00Z", "level": "INFO", "message": text}) + "\n"
