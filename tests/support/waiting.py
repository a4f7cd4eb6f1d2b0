"""Wait for a condition, with little delay, and as long as a slow machine needs."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, TypeVar

import httpx

TIMEOUT = 600
"""Seconds. Only a test that fails waits so long."""
WEBSOCKET_OPTIONS: dict[str, Any] = {"proxy": None, "open_timeout": TIMEOUT, "ping_interval": None}
"""For `websockets.connect`: no connection ends because one side pauses."""
Result = TypeVar("Result")


def eventually(condition: Callable[[], Result | None], seconds: float = TIMEOUT) -> Result:
    """Call `condition` until its result is true, and return that."""
    deadline = time.monotonic() + seconds
    pause = 0.05
    last_error: Exception | None = None
    while True:
        is_last = time.monotonic() > deadline
        try:
            if result := condition():
                return result
        except (httpx.TransportError, AssertionError) as error:
            last_error = error  # a killed process may be unavailable for a moment
        if is_last:
            raise AssertionError(f"not seen within {seconds} s") from last_error
        time.sleep(pause)
        pause = min(pause * 1.2, 0.5)  # each call costs the awaited process time


async def eventually_async(condition: Callable[[], Result | None]) -> Result:
    return await asyncio.to_thread(eventually, condition)
