"""The events actor: it passes live messages from any process of the cluster to every gateway replica.

It stores nothing durable: the facts are in the database. A reader that missed messages is notified and reads the
database. The actor may die at any time; its successor starts empty, with a new incarnation id.
The actor also holds the latest request counts of each replica, because a scrape reaches one replica and must report
the sum of all.
"""

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple, TypedDict

import orjson

from cluster.actors import find_actor, forget_actor
from cluster.errors import Unavailable
from cluster.times import format_utc

ACTOR_NAME = "events"
MAX_BUFFERED_MESSAGES = 10_000
MAX_BUFFERED_BYTES = 32 * 1024 * 1024
MAX_BATCH_MESSAGES = 1_000
BATCH_DELAY_SECONDS = 0.01
"""How long a poll waits for more messages after the first. It limits the responses per second of a busy cluster."""
POLL_SECONDS = 30.0
GRACE_SECONDS = 10.0
LOOKUP_RETRY_SECONDS = 5.0

logger = logging.getLogger(__name__)

_no_lookup_before = 0.0


class Message(TypedDict):
    rooms: list[str]
    type: str
    data: dict[str, Any]
    timestamp: str


class Cursor(NamedTuple):
    """The position of a reader in the messages of one incarnation of the actor."""

    incarnation: str
    position: int


class Batch(NamedTuple):
    messages: list[Message]
    cursor: Cursor
    missed: bool  # messages between the reader's cursor and these are lost


LOST_CURSOR = Cursor("", 0)
"""The cursor of a reader that lost its position. Its next poll reports `missed`."""

Snapshot = Mapping[str, float]
"""The counts of a replica: a value for each sample, by a key that all replicas share."""


def build_message(rooms: Sequence[str], kind: str, data: Mapping[str, Any], at: datetime) -> Message:
    return {"rooms": [*rooms], "type": kind, "data": {**data}, "timestamp": format_utc(at)}


def publish(messages: Sequence[Message]) -> None:
    """Send messages to all listeners, from any process. Without Ray or the actor they are dropped."""
    global _no_lookup_before
    if not messages or time.monotonic() < _no_lookup_before:
        return
    try:
        reference = find_actor(ACTOR_NAME).publish.remote(list(messages))
    except Unavailable as error:
        # A lookup costs a round trip. A cluster without this actor must not pay that for each message.
        _no_lookup_before = time.monotonic() + LOOKUP_RETRY_SECONDS
        logger.debug("%s messages were not published: %s", len(messages), error)
    except Exception:
        # Ray raises various errors while it shuts down. The facts are in the database, so the caller continues.
        logger.debug("%s messages were not published.", len(messages), exc_info=True)
    else:
        reference.future().add_done_callback(_forget_if_dead)


async def poll(after: Cursor | None, seconds: float = POLL_SECONDS) -> Batch:
    """Wait up to `seconds` for messages after a cursor. With None, return the current cursor at once."""
    return await _call_actor("poll", after, seconds, timeout_seconds=seconds + GRACE_SECONDS)


async def share_counts(replica: str, snapshot: Snapshot) -> None:
    """Store this replica's counts in the actor, instead of its previous ones."""
    await _call_actor("share_counts", replica, snapshot)


async def shared_counts() -> dict[str, Snapshot]:
    """Return the last counts of every replica, including replicas that have ended."""
    return await _call_actor("shared_counts")


class Events:
    """The actor. Every method is async, so Ray runs all calls on one event loop and no locks are needed."""

    def __init__(self) -> None:
        self._incarnation = secrets.token_hex(8)
        self._messages: deque[Message] = deque()
        self._sizes: deque[int] = deque()  # of these messages, in bytes
        self._bytes = 0
        self._published = 0
        self._new_messages = asyncio.Event()
        self._counts: dict[str, Snapshot] = {}

    async def publish(self, messages: Sequence[Message]) -> None:
        sizes = [len(orjson.dumps(message, default=str)) for message in messages]
        self._messages.extend(messages)
        self._sizes.extend(sizes)
        self._bytes += sum(sizes)
        while len(self._messages) > MAX_BUFFERED_MESSAGES or self._bytes > MAX_BUFFERED_BYTES:
            self._messages.popleft()
            self._bytes -= self._sizes.popleft()
        self._published += len(messages)
        self._new_messages.set()
        self._new_messages = asyncio.Event()

    async def poll(self, after: Cursor | None, seconds: float) -> Batch:
        if after is None:
            return Batch([], Cursor(self._incarnation, self._published), missed=False)
        if after == Cursor(self._incarnation, self._published):
            await self._wait_for_messages(seconds)
        return self._read(after)

    async def share_counts(self, replica: str, snapshot: Snapshot) -> None:
        self._counts[replica] = snapshot

    async def shared_counts(self) -> dict[str, Snapshot]:
        return self._counts

    async def _wait_for_messages(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                await self._new_messages.wait()
        except TimeoutError:
            return
        await asyncio.sleep(BATCH_DELAY_SECONDS)

    def _read(self, after: Cursor) -> Batch:
        oldest = self._published - len(self._messages)
        same_incarnation = after.incarnation == self._incarnation
        start = max(after.position, oldest) if same_incarnation else oldest
        messages = list(islice(self._messages, start - oldest, start - oldest + MAX_BATCH_MESSAGES))
        missed = not same_incarnation or after.position < oldest
        return Batch(messages, Cursor(self._incarnation, start + len(messages)), missed)


async def _call_actor(method: str, *arguments: object, timeout_seconds: float = GRACE_SECONDS) -> Any:
    actor = await asyncio.to_thread(find_actor, ACTOR_NAME)
    from ray.exceptions import RayActorError, RaySystemError

    try:
        async with asyncio.timeout(timeout_seconds):
            return await getattr(actor, method).remote(*arguments)
    except (RayActorError, RaySystemError, TimeoutError) as error:
        forget_actor(ACTOR_NAME)
        raise Unavailable("The events actor does not answer; Ray restarts it.") from error


def _forget_if_dead(future: Future[None]) -> None:
    from ray.exceptions import RayActorError

    if isinstance(future.exception(), RayActorError):
        forget_actor(ACTOR_NAME)
