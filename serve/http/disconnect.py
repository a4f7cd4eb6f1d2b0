"""Cancel the work when the client disconnects."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

Answered = TypeVar("Answered")


async def while_connected(request: Request, work: Awaitable[Answered]) -> Answered:
    """Do what a client waits for; when it goes away, stop. It gets no answer then, whatever is raised here."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait([working, leaving], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            working.cancel()
            await asyncio.wait([working])
        return working.result()
    except asyncio.CancelledError:
        working.cancel()
        raise
    finally:
        leaving.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
