"""Forwards live messages to clients: hubs distribute a feed to subscriptions, and WebSockets send them.

A replica has one hub for each feed (events, samples of this machine, log lines). A hub reads its feed only while it has
subscriptions. A slow subscription does not delay the others: it is dropped when its queue is full.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import aclosing, suppress
from typing import Any, NamedTuple, Self

import orjson
from sqlalchemy.exc import SQLAlchemyError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from cluster.db import is_transient
from serve.security.callers import POLICY_VIOLATION, is_still_authorized

Message = Mapping[str, Any]
"""A live message: `rooms` selects the subscriptions; clients receive all other fields."""
Feed = Callable[[], AsyncGenerator[list[Message]]]
Transform = Callable[[Message], Awaitable[Message]]
MessageHandler = Callable[[dict[str, Any]], Awaitable[Message]]
FrameHandler = Callable[[str | bytes], Awaitable[Message]]

BROADCAST_ROOM = "*"
MAX_QUEUED_MESSAGES = 256
SEND_SECONDS = 10.0
CLOSE_SECONDS = 2.0
READY_SECONDS = 5.0
AUTH_CHECK_SECONDS = 5.0
"""After a credential has expired or ended, or its account is disabled, a connection ends within this time."""
MAX_FRAME_LENGTH = 16_384
"""Of a client's message. The largest that means something has some hundred characters; all are parsed on the loop."""
MESSAGE_TOO_BIG = 1009
TRY_AGAIN_LATER = 1013

logger = logging.getLogger(__name__)


class Subscription:
    """The message queue of one client. Use it as `async with hub.subscribe(rooms) as subscription`."""

    def __init__(self, hub: "Hub", rooms: Iterable[str]) -> None:
        self.rooms = {*rooms, BROADCAST_ROOM}
        self.dropped = False
        self._hub = hub
        self._queue = asyncio.Queue[Message | None](MAX_QUEUED_MESSAGES)

    async def __aenter__(self) -> Self:
        """From now on no message is missed without an `events.missed`."""
        await self._hub.add(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._hub.remove(self)

    async def __aiter__(self) -> AsyncIterator[Message]:
        while (message := await self._queue.get()) is not None:
            yield message

    async def get(self, timeout: float) -> Message | None:  # noqa: ASYNC109
        """The next message; None after `timeout` seconds, or if this subscription was dropped."""
        try:
            async with asyncio.timeout(timeout):
                return await self._queue.get()
        except TimeoutError:
            return None

    def put(self, message: Message) -> None:
        if self.dropped:
            return
        if self._queue.full():
            return self.drop()
        self._queue.put_nowait(message)

    def drop(self) -> None:
        """End this subscription: discard its queue, and wake its reader."""
        self.dropped = True
        self._hub.remove(self)
        while not self._queue.empty():
            self._queue.get_nowait()
        self._queue.put_nowait(None)

    def join(self, room: str) -> None:
        self._hub.join(self, room)

    def leave(self, room: str) -> None:
        self._hub.leave(self, room)


class Hub:
    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self._members: defaultdict[str, set[Subscription]] = defaultdict(set)
        self._listening: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    def subscribe(self, rooms: Iterable[str]) -> Subscription:
        return Subscription(self, rooms)

    def listeners(self, room: str = BROADCAST_ROOM) -> int:
        return len(self._members.get(room, ()))

    async def add(self, subscription: Subscription) -> None:
        for room in subscription.rooms:
            self._members[room].add(subscription)
        if self._listening is None:
            self._ready.clear()
            self._listening = asyncio.create_task(self._listen())
        with suppress(TimeoutError):  # a slow feed must not block the client
            async with asyncio.timeout(READY_SECONDS):
                await self._ready.wait()

    def remove(self, subscription: Subscription) -> None:
        for room in tuple(subscription.rooms):
            self.leave(subscription, room)
        if self._listening and not self.listeners():
            self._listening.cancel()
            self._listening = None

    def join(self, subscription: Subscription, room: str) -> None:
        subscription.rooms.add(room)
        self._members[room].add(subscription)

    def leave(self, subscription: Subscription, room: str) -> None:
        subscription.rooms.discard(room)
        self._members[room].discard(subscription)
        if not self._members[room]:
            del self._members[room]

    async def _listen(self) -> None:
        try:
            async with aclosing(self._feed()) as feed:
                async for messages in feed:
                    self._ready.set()
                    for message in messages:
                        self._deliver(message)
        except Exception:
            logger.exception("A feed of live messages failed. Its subscriptions are dropped; clients can reconnect.")
            for subscription in tuple(self._members[BROADCAST_ROOM]):
                subscription.drop()

    def _deliver(self, message: Message) -> None:
        for subscription in set[Subscription]().union(*(self._members.get(room, ()) for room in message["rooms"])):
            subscription.put(message)


def error_message(text: str) -> Message:
    return {"type": "error", "message": text}


def pong_message() -> Message:
    return {"type": "pong"}


class Replies(NamedTuple):
    """What a socket answers to a ping, and to a message that is none."""

    pong: Callable[[], Message] = pong_message
    error: Callable[[str], Message] = error_message


STANDARD_REPLIES = Replies()


async def serve_socket(
    socket: WebSocket,
    subscription: Subscription,
    on_message: MessageHandler,
    transform: Transform | None = None,
    replies: Replies = STANDARD_REPLIES,
) -> None:
    """Send the messages of the subscription and respond to those of the client, until one of them ends.

    `transform` replaces each live message before it is sent.
    """

    async def handle(content: str | bytes) -> Message:
        return await _handle_message(content, on_message, replies)

    try:
        closing = await _exchange_messages(socket, subscription, handle, transform)
    except* SQLAlchemyError as errors:
        if errors.subgroup(lambda error: isinstance(error, SQLAlchemyError) and not is_transient(error)):
            raise
        closing = TRY_AGAIN_LATER, "The database does not respond. Connect again."
    if closing is not None:
        await _close(socket, *closing)


async def _exchange_messages(
    socket: WebSocket, subscription: Subscription, handle: FrameHandler, transform: Transform | None
) -> tuple[int, str] | None:
    """Returns at the end of either direction, or of the authorization: the code and reason to close with, if any."""
    async with asyncio.TaskGroup() as tasks:
        sending = tasks.create_task(_send_all(socket, subscription, transform))
        receiving = tasks.create_task(_receive_all(socket, subscription, handle))
        authorization_check = tasks.create_task(_until_unauthorized(socket))
        all_tasks = (sending, receiving, authorization_check)
        for task in all_tasks:
            task.add_done_callback(lambda _: [other.cancel() for other in all_tasks])
    if not authorization_check.cancelled():
        return POLICY_VIOLATION, "The credential is no longer valid."
    if subscription.dropped:
        return TRY_AGAIN_LATER, "Too many messages were waiting. Connect again."
    if not receiving.cancelled() and receiving.result() > MAX_FRAME_LENGTH:
        return MESSAGE_TOO_BIG, f"A message may have {MAX_FRAME_LENGTH} characters."
    return None


async def _close(socket: WebSocket, code: int, reason: str) -> None:
    """Close the socket. If the client does not read the close frame, the connection just ends."""
    if socket.application_state == WebSocketState.CONNECTED:
        with suppress(TimeoutError, WebSocketDisconnect):
            async with asyncio.timeout(CLOSE_SECONDS):
                await socket.close(code, reason)


async def _until_unauthorized(socket: WebSocket) -> None:
    while True:
        await asyncio.sleep(AUTH_CHECK_SECONDS)
        if not await is_still_authorized(socket):
            return


async def _send_all(socket: WebSocket, subscription: Subscription, transform: Transform | None) -> None:
    try:
        async for message in subscription:
            if transform and "rooms" in message:
                message = await transform(message)
            content = {name: value for name, value in message.items() if name != "rooms"}
            text = orjson.dumps(content, default=str, option=orjson.OPT_UTC_Z).decode()
            async with asyncio.timeout(SEND_SECONDS):
                await socket.send_text(text)
    except TimeoutError:
        subscription.drop()
    except WebSocketDisconnect:
        return


async def _receive_all(socket: WebSocket, subscription: Subscription, handle: FrameHandler) -> int:
    """Respond to the messages of the client. Returns the length of one that is too long, or 0 at the end."""
    while (frame := await socket.receive())["type"] == "websocket.receive":
        content: str | bytes = frame.get("text") or frame.get("bytes") or b""
        if len(content) > MAX_FRAME_LENGTH:
            return len(content)
        # Responses use the same queue, so a client that sends without reading is dropped, too.
        subscription.put(await handle(content))
    return 0


async def _handle_message(content: str | bytes, on_message: MessageHandler, replies: Replies) -> Message:
    try:
        message: Any = orjson.loads(content)
    except orjson.JSONDecodeError:
        message = None
    if not isinstance(message, dict):
        return replies.error('A message is a JSON object, such as {"type": "ping"}.')
    return replies.pong() if message.get("type") == "ping" else await on_message(message)
