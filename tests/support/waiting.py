"""Waiting for what is to come: hardly longer than that takes, and on a slow machine for as long as it needs."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

PATIENCE = 600
"""Seconds. Only a test that fails waits so long."""
PATIENT: dict[str, Any] = {"proxy": None, "open_timeout": PATIENCE, "ping_interval": None}
"""Of a WebSocket: no connection ends because one of its ends stands still for a while."""
Found = TypeVar("Found")


def eventually(look: Callable[[], Found | None], seconds: float = PATIENCE) -> Found:
    """The first thing that `look` finds which is not nothing, false or empty."""
    deadline = time.monotonic() + seconds
    pause = 0.05
    last_error: Exception | None = None
    while True:
        is_last = time.monotonic() > deadline
        try:
            if found := look():
                return found
        except (httpx.TransportError, AssertionError) as error:
            last_error = error  # a part that was killed may be away for a moment
        if is_last:
            raise AssertionError(f"not seen within {seconds} s") from last_error
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)  # each answer is work for those who are waited for


async def eventually_async(look: Callable[[], Found | None]) -> Found:
    return await asyncio.to_thread(eventually, look)
