"""The monitor: it reads all sources of all servers, each at its own pace, so that one that hangs delays no other.

`forgearr up` starts one as an actor, and all replicas of the gateway ask it. It stores nothing.
"""

import asyncio
import logging
import time
from contextlib import suppress

from cluster import logs
from cluster.db import now
from cluster.errors import ForgearrError
from cluster.servers.sources import Source, Sources, configured_sources
from cluster.servers.states import Reading, Snapshot, SourceReading, server_state
from cluster.settings import get_settings

ACTOR_NAME = "monitor"
READ_SECONDS = 10.0
POLL_SECONDS = 30.0

logger = logging.getLogger(__name__)


class ServerMonitor:
    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._readings = {
            server: {name: SourceReading(source.period_seconds) for name, source in of_server.items()}
            for server, of_server in sources.items()
        }
        self._version = 0
        self._changed = asyncio.Event()

    def snapshot(self) -> Snapshot:
        moment = time.monotonic()
        servers = {name: server_state(readings, moment) for name, readings in self._readings.items()}
        return Snapshot(version=self._version, servers=servers)

    async def read_all(self) -> Snapshot:
        """Read each source once, and leave nothing open."""
        await asyncio.gather(*(self._read(*entry) for entry in self._all()))
        await asyncio.gather(*(source.close() for _, _, source in self._all() if source.close))
        return self.snapshot()

    async def read_forever(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            for entry in self._all():
                tasks.create_task(self._read_periodically(*entry))

    async def wait_for_change(self, version: int, seconds: float) -> Snapshot:
        """The snapshot after this version, or the same one again after some seconds."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._version <= version:
                    await self._changed.wait()
        return self.snapshot()

    def _all(self) -> list[tuple[str, str, Source]]:
        return [(server, name, source) for server, named in self._sources.items() for name, source in named.items()]

    async def _read_periodically(self, server: str, name: str, source: Source) -> None:
        while True:
            started = time.monotonic()
            await self._read(server, name, source)
            await asyncio.sleep(max(started + source.period_seconds - time.monotonic(), 0))

    async def _read(self, server: str, name: str, source: Source) -> None:
        before = self._readings[server][name]
        started = time.monotonic()
        try:
            async with asyncio.timeout(READ_SECONDS):
                values = await source.read()
        except TimeoutError:
            after = before._replace(error=f"It did not answer within {READ_SECONDS:.0f} s.")
        except ForgearrError as error:
            after = before._replace(error=error.message)
        except Exception as error:
            logger.exception("A source of a server cannot be read: %s of %s.", name, server)
            after = before._replace(error=f"{type(error).__name__}: {logs.redact(str(error))}")
        else:
            ended = time.monotonic()
            after = before._replace(reading=Reading(values, ended, now(), ended - started), error=None)
        self._readings[server][name] = after
        self._version += 1
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()


class Monitor:
    """The actor. Ray runs all its calls on one event loop."""

    def __init__(self) -> None:
        logs.configure("monitor")
        self._monitor = ServerMonitor(configured_sources(get_settings().servers))
        self._reading = asyncio.create_task(self._monitor.read_forever())

    async def snapshot(self) -> Snapshot:
        return self._monitor.snapshot()

    async def poll(self, version: int, seconds: float = POLL_SECONDS) -> Snapshot:
        return await self._monitor.wait_for_change(version, seconds)
