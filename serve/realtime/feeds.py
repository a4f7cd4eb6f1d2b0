"""The feeds of live messages: events of all processes, samples of this machine, and its log lines.

A feed yields batches of messages. After its first batch, which may be empty, it misses no message.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import suppress
from os import SEEK_END
from pathlib import Path
from typing import Any

import orjson

from cluster import events, logs, nodes
from cluster.db import now
from cluster.errors import Unavailable
from serve.realtime.hub import BROADCAST_ROOM, Message

Poll = Callable[[events.Cursor | None], Awaitable[events.Batch]]

RETRY_SECONDS = 1.0
SAMPLE_SECONDS = 2.0
LOG_SECONDS = 0.5
LOG_BYTES = 1_000_000

logger = logging.getLogger(__name__)


async def follow_events(poll: Poll = events.poll) -> AsyncGenerator[list[Message]]:
    """The messages of all processes. `events.missed` marks a gap: clients then read the database."""
    cursor: events.Cursor | None = None
    while True:
        try:
            batch = await poll(cursor)
        except Unavailable as error:
            logger.debug("No live events: %s", error)
            cursor = events.LOST_CURSOR
            yield []
            await asyncio.sleep(RETRY_SECONDS)
            continue
        cursor = batch.cursor
        yield [_missed_message(), *batch.messages] if batch.missed else list(batch.messages)


async def follow_system() -> AsyncGenerator[list[Message]]:
    """A sample of this machine every two seconds."""
    yield []
    async for sample in nodes.stream_metrics(SAMPLE_SECONDS):
        yield [{"rooms": [BROADCAST_ROOM], **sample}]


async def follow_logs() -> AsyncGenerator[list[Message]]:
    """New log lines of the components on this machine."""
    positions = {path: path.stat().st_size for path in logs.folder().glob("*.jsonl")}
    while True:
        lines = await asyncio.to_thread(_new_lines, positions)
        yield [{"rooms": [BROADCAST_ROOM], **line} for line in lines]
        await asyncio.sleep(LOG_SECONDS)


def _missed_message() -> Message:
    return {
        "rooms": [BROADCAST_ROOM],
        "type": "events.missed",
        "data": {},
        "timestamp": now(),
    }


def _new_lines(positions: dict[Path, int]) -> list[dict[str, Any]]:
    """The complete lines after `positions`, which are updated."""
    lines: list[dict[str, Any]] = []
    for path in logs.folder().glob("*.jsonl"):
        with suppress(FileNotFoundError), path.open("rb") as file:  # it may be rotated meanwhile
            size = file.seek(0, SEEK_END)
            position = positions.get(path, 0)
            if position > size:
                position = 0  # it was rotated: this is a new file
            file.seek(max(position, size - LOG_BYTES))
            text = file.read()
            complete = text[: text.rfind(b"\n") + 1]
            positions[path] = file.tell() - len(text) + len(complete)
            lines += [line for raw in complete.splitlines() for line in _parsed(raw)]
    return sorted(lines, key=lambda line: str(line["timestamp"]))


def _parsed(raw: bytes) -> Iterator[dict[str, Any]]:
    """The parsed line; nothing if it is incomplete."""
    with suppress(orjson.JSONDecodeError):
        line = orjson.loads(raw)
        if isinstance(line, dict) and "timestamp" in line:
            yield line
