"""A TCP relay in front of a server, which a test can cut and restore: the server seems to go away and come back."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress

from tests.support.platform import unused_ports


class Relay:
    def __init__(self, target_port: int) -> None:
        (self.port,) = unused_ports(1)
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def restore(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def cut(self) -> None:
        """Refuse new connections, and break those that are open."""
        if self._server:
            self._server.close()
            self._server = None
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
        writers = {writer, server_writer}
        self._writers |= writers
        await asyncio.wait(
            [asyncio.create_task(_copy(reader, server_writer)), asyncio.create_task(_copy(server_reader, writer))],
            return_when=asyncio.FIRST_COMPLETED,
        )
        for end in writers:
            end.transport.abort()
        self._writers -= writers


@asynccontextmanager
async def running_relay(target_port: int) -> AsyncGenerator[Relay]:
    relay = Relay(target_port)
    await relay.restore()
    yield relay
    await relay.cut()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):  # an end was aborted
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
