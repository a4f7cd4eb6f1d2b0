"""The WebSocket /ws/metrics, with the messages of its documentation."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from cluster.db import Database
from cluster.settings import get_settings
from serve.app import create_app
from serve.servers import socket as server_socket
from tests.support.app_server import running_app
from tests.support.waiting import WEBSOCKET_OPTIONS

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)


@pytest.fixture
async def address(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    monkeypatch.setenv("FORGEARR_SERVERS__PERIOD_SECONDS", "0.5")
    get_settings.cache_clear()
    async with running_app(create_app()) as address:
        yield f"ws://{address}/ws/metrics"


async def receive(client: ClientConnection, event_type: str) -> dict[str, Any]:
    """The next message of this type."""
    while True:
        message = json.loads(await client.recv())
        assert message["timestamp"].endswith("Z")
        if message["event_type"] == event_type:
            return message


async def test_the_first_message_greets_and_the_second_has_all(address: str) -> None:
    async with connect(address, **WEBSOCKET_OPTIONS) as client:
        greeting = json.loads(await client.recv())
        assert (greeting["event_type"], greeting["message"]) == (
            "connection_established",
            "Connected to metrics stream",
        )
        overview = json.loads(await client.recv())
        assert (overview["event_type"], overview["server_type"]) == ("metrics_update", "overview")
        assert overview["data"]["total_servers"] == 1
        assert overview["data"]["app_server"] is None


async def test_each_measurement_is_sent_as_overview_and_by_server(address: str) -> None:
    async with connect(address, **WEBSOCKET_OPTIONS) as client:
        seen: list[str] = []
        while seen.count("ai_server") < 2:
            update = await receive(client, "metrics_update")
            seen.append(update["server_type"])
            if update["server_type"] == "ai_server":
                assert update["data"]["memory"]["total_gb"] > 0
        assert seen.count("overview") >= 2


async def test_a_client_may_ping_and_ask(address: str) -> None:
    async with connect(address, **WEBSOCKET_OPTIONS) as client:
        await client.send('{"type": "ping", "timestamp": "2025-01-05T20:15:00Z"}')
        assert (await receive(client, "pong")).keys() == {"event_type", "timestamp"}
        await client.send('{"type": "request_update"}')
        await client.send('{"type": "dance"}')
        assert "ping or request_update" in (await receive(client, "error"))["message"]
        await client.send("no json")
        assert "JSON object" in (await receive(client, "error"))["message"]


async def test_a_heartbeat_has_the_number_of_connections(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_socket, "HEARTBEAT_SECONDS", 0.05)
    async with connect(address, **WEBSOCKET_OPTIONS) as first, connect(address, **WEBSOCKET_OPTIONS) as second:
        await receive(second, "heartbeat")
        while (await receive(first, "heartbeat"))["connections"] != 2:
            pass


async def test_many_clients_cost_one_measurement(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from cluster.servers.machine import Machine

    count = 0
    read = Machine.read

    async def counted(machine: Machine) -> Any:
        nonlocal count
        count += 1
        return await read(machine)

    monkeypatch.setattr(Machine, "read", counted)
    clients = [await connect(address, **WEBSOCKET_OPTIONS) for _ in range(30)]
    await asyncio.gather(*(receive(client, "metrics_update") for client in clients))
    before = count
    for _ in range(3):
        await asyncio.gather(*(_receive_server(client) for client in clients))
    await asyncio.gather(*(client.close() for client in clients))
    assert count - before < len(clients), "each measurement is sent to all"


async def _receive_server(client: ClientConnection) -> None:
    while (await receive(client, "metrics_update"))["server_type"] != "ai_server":
        pass


async def test_a_stranger_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    get_settings.cache_clear()
    with pytest.raises(InvalidStatus):
        await connect(address, **WEBSOCKET_OPTIONS)
