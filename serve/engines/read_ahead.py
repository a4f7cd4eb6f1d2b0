"""Answers that are heard at the pace of who gives them, and read at any other.

A model whose words nobody took would keep its slot, and one reader who takes nothing would in the end hold up all that
the same engine says to others, because they share a connection. What is not read yet is at most one answer.
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing

from serve.engines.protocol import Chunk


async def read_ahead(answer: AsyncGenerator[list[Chunk], None]) -> AsyncGenerator[list[Chunk]]:
    heard = asyncio.Queue[list[Chunk] | Exception | None]()
    hearing = asyncio.create_task(_hear(answer, heard))
    try:
        while (told := await heard.get()) is not None:
            if isinstance(told, Exception):
                raise told
            yield told
    finally:
        hearing.cancel()
        await asyncio.wait([hearing])


async def _hear(
    answer: AsyncGenerator[list[Chunk], None], heard: asyncio.Queue[list[Chunk] | Exception | None]
) -> None:
    try:
        async with aclosing(answer):
            async for chunks in answer:
                heard.put_nowait(chunks)
        heard.put_nowait(None)
    except Exception as error:
        heard.put_nowait(error)
