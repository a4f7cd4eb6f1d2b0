"""Reads the stream of an engine at full speed, however slowly the client reads it.

Otherwise a slow client would occupy a slot of the model until it has read everything. It would also block the streams
of other clients, because all streams of an engine share a connection. The buffer holds at most one completion.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve.engines.protocol import Chunk


async def read_ahead(stream: AsyncGenerator[list[Chunk], None]) -> AsyncGenerator[list[Chunk]]:
    queue = asyncio.Queue[list[Chunk] | Exception | None]()
    reader = asyncio.create_task(_fill_queue(stream, queue))
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        reader.cancel()
        await asyncio.wait([reader])


async def _fill_queue(
    stream: AsyncGenerator[list[Chunk], None], queue: asyncio.Queue[list[Chunk] | Exception | None]
) -> None:
    try:
        async with aclosing(stream):
            async for chunks in stream:
                queue.put_nowait(chunks)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
