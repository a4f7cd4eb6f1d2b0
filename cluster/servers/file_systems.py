"""Reads the sizes of file systems in a child process, which is killed if one of them does not answer."""

import asyncio
import json
import sys
import time
from asyncio.subprocess import DEVNULL, PIPE, Process
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ANSWER_SECONDS = 1.0
RETRY_SECONDS = 30.0
"""A mount that hangs costs a process each time it is asked."""
CHILD = Path(__file__).with_name("statvfs_child.py")


@dataclass(frozen=True)
class Size:
    """In bytes. If the file system does not answer, all are None."""

    total: int | None = None
    used: int | None = None
    available: int | None = None
    error: str | None = None


class FileSystems:
    def __init__(self) -> None:
        self._child: Process | None = None
        self._hanging: dict[str, float] = {}  # when each may be asked again
        self._lock = asyncio.Lock()

    async def sizes(self, mount_points: list[str]) -> dict[str, Size]:
        async with self._lock:
            return {mount_point: await self._size(mount_point) for mount_point in mount_points}

    async def close(self) -> None:
        child, self._child = self._child, None
        if child:
            with suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _size(self, mount_point: str) -> Size:
        if time.monotonic() < self._hanging.get(mount_point, 0):
            return _hangs()
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                answer = await self._ask(mount_point)
        except TimeoutError:
            self._hanging[mount_point] = time.monotonic() + RETRY_SECONDS
            await self.close()
            return _hangs()
        except BaseException:
            # Without its answer, the next question would get that of this one.
            await self.close()
            raise
        self._hanging.pop(mount_point, None)
        return Size(**answer)

    async def _ask(self, mount_point: str) -> dict[str, Any]:
        if self._child is None:
            command = [sys.executable, "-I", "-S", str(CHILD)]
            self._child = await asyncio.create_subprocess_exec(*command, stdin=PIPE, stdout=PIPE, stderr=DEVNULL)
        child = self._child
        assert child.stdin
        assert child.stdout
        child.stdin.write(json.dumps(mount_point).encode() + b"\n")
        await child.stdin.drain()
        answer = await child.stdout.readline()
        if not answer:
            raise ConnectionResetError("The process that reads the sizes of file systems has ended.")
        return json.loads(answer)


def _hangs() -> Size:
    return Size(error=f"does not answer; it is asked again every {RETRY_SECONDS:.0f} s")
