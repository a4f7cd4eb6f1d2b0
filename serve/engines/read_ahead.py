"""Answers that are heard at the pace of who gives them, and read at any other.

A model whose words nobody took would keep its slot, and one reader who takes nothing would in the end hold up all that
the same engine says to others, because they share a connection. What is not read yet is at most one answer.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve.engines.protocol import Chunk


async def read_ahead(answer: AsyncGenerator[list[Chunk], None]) -> AsyncGenerator[list[Chunk]]:
    queue = asyncio.Queue[list[Chunk] | Exception | None]()
    reader = asyncio.create_task(_fill_queue(answer, queue))
    try:
        while (item := await queue.get()) is not None:
            if isinstance(item, Exception):
                raise item
            yield item
    finally:
        reader.cancel()
        await asyncio.wait([reader])


async def _fill_queue(
    answer: AsyncGenerator[list[Chunk], None], queue: asyncio.Queue[list[Chunk] | Exception | None]
) -> None:
    try:
        async with aclosing(answer):
            async for chunks in answer:
                queue.put_nowait(chunks)
        queue.put_nowait(None)
    except Exception as error:
        queue.put_nowait(error)
