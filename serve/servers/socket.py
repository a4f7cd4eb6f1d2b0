"""The WebSocket /ws/metrics: the values of all servers, as they are measured.

All clients of a replica share one reading of the monitor, and each message is serialized as the documentation has it:
`event_type` instead of `type`.
"""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from pydantic import BaseModel
from starlette.websockets import WebSocket

from cluster.db import now
from cluster.errors import Unavailable
from cluster.servers.states import Snapshot
from cluster.times import format_utc
from serve.realtime.hub import BROADCAST_ROOM, Hub, Message, Replies, serve_socket
from serve.servers.live import LiveServers
from serve.servers.views import overview, server_view

HEARTBEAT_SECONDS = 30.0
OVERVIEW = "overview"


class ServerSocket:
    def __init__(self, servers: LiveServers) -> None:
        self._servers = servers
        self._hub = Hub(self._follow)

    async def serve(self, socket: WebSocket) -> None:
        async with self._hub.subscribe(()) as subscription:
            await socket.accept()
            subscription.put(_message("connection_established", message="Connected to metrics stream"))
            heartbeat = asyncio.create_task(self._beat(subscription.put))
            try:
                subscription.put(await self._current())
                await serve_socket(socket, subscription, self._answer, replies=Replies(_pong, _error))
            finally:
                heartbeat.cancel()

    async def _follow(self) -> AsyncGenerator[list[Message]]:
        yield []
        async for snapshot in self._servers.follow():
            yield [{"rooms": [BROADCAST_ROOM], **message} for message in _updates(snapshot)]

    async def _beat(self, put: Callable[[Message], None]) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_SECONDS)
            put(_message("heartbeat", connections=self._hub.listeners()))

    async def _answer(self, message: dict[str, Any]) -> Message:
        if message.get("type") != "request_update":
            return _error("A message's type is ping or request_update.")
        return await self._current()

    async def _current(self) -> Message:
        try:
            return _update(OVERVIEW, overview(await self._servers.current()))
        except Unavailable as error:
            return _error(error.message)


def _updates(snapshot: Snapshot) -> list[Message]:
    return [
        _update(OVERVIEW, overview(snapshot)),
        *(_update(name, server_view(state)) for name, state in snapshot.servers.items()),
    ]


def _update(server: str, data: BaseModel) -> Message:
    return _message("metrics_update", server_type=server, data=data.model_dump(mode="json"))


def _message(event_type: str, **fields: Any) -> Message:
    return {"event_type": event_type, **fields, "timestamp": format_utc(now())}


def _pong() -> Message:
    return _message("pong")


def _error(text: str) -> Message:
    return _message("error", message=text)
