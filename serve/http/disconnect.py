"""Cancels the work for a request when its client disconnects."""

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

from fastapi import Request

Result = TypeVar("Result")


async def cancel_on_disconnect(request: Request, awaitable: Awaitable[Result]) -> Result:
    """Await the result, or cancel it when the client disconnects. The response then reaches nobody."""
    task = asyncio.ensure_future(awaitable)
    disconnect = asyncio.ensure_future(_wait_for_disconnect(request))
    try:
        await asyncio.wait([task, disconnect], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            task.cancel()
            await asyncio.wait([task])
        return task.result()
    except asyncio.CancelledError:
        task.cancel()
        raise
    finally:
        disconnect.cancel()


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
