"""The newest values of all servers in this replica: read from the monitor at most once a period."""

import asyncio
import time
from collections.abc import AsyncGenerator

from cluster import actors
from cluster.errors import Unavailable
from cluster.servers import monitor
from cluster.servers.monitor import ServerMonitor
from cluster.servers.sources import configured_sources
from cluster.servers.states import Snapshot
from cluster.settings import get_settings

ANSWER_SECONDS = 2.0
RETRY_SECONDS = 1.0


class LiveServers:
    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._cached: Snapshot | Unavailable = Unavailable()
        self._cached_until = 0.0
        self._local: ServerMonitor | None = None

    async def current(self) -> Snapshot:
        """Raises Unavailable if the monitor does not answer."""
        async with self._lock:
            if time.monotonic() >= self._cached_until:
                try:
                    self._cached = await self._read()
                except Unavailable as error:  # else all who wait would ask, one after the other
                    self._cached = error
                self._cached_until = time.monotonic() + get_settings().servers.period_seconds / 2
        if isinstance(self._cached, Unavailable):
            raise Unavailable(self._cached.message)
        return self._cached

    async def follow(self) -> AsyncGenerator[Snapshot]:
        """Each new snapshot, without end. While the monitor does not answer there is none."""
        version = -1
        while True:
            try:
                snapshot = await self._next(version)
            except Unavailable:
                await asyncio.sleep(RETRY_SECONDS)
                version = -1  # that of its successor begins again
                continue
            version = snapshot.version
            yield snapshot
            await asyncio.sleep(get_settings().servers.period_seconds / 2)  # several sources may change at once

    async def _next(self, version: int) -> Snapshot:
        if not actors.has_joined():
            return await self.current()
        return await _ask_monitor("poll", version, seconds=monitor.POLL_SECONDS + ANSWER_SECONDS)

    async def _read(self) -> Snapshot:
        if not actors.has_joined():
            # Under plain uvicorn there are no actors: this process measures by itself.
            self._local = self._local or ServerMonitor(configured_sources(get_settings().servers))
            return await self._local.read_all()
        return await _ask_monitor("snapshot", seconds=ANSWER_SECONDS)


async def _ask_monitor(method: str, *args: object, seconds: float) -> Snapshot:
    actor = await asyncio.to_thread(actors.find_actor, monitor.ACTOR_NAME)
    from ray.exceptions import RayActorError, RaySystemError

    try:
        async with asyncio.timeout(seconds):
            return await getattr(actor, method).remote(*args)
    except (RayActorError, RaySystemError, TimeoutError) as error:
        actors.forget_actor(monitor.ACTOR_NAME)
        raise Unavailable("The monitor of the servers does not answer; it is restarted by itself.") from error
