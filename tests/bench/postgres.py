"""A PostgreSQL of its own for a benchmark, as durable as it comes."""

import asyncio
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg

from tests.support.storage import postgres


@contextmanager
def running_postgres() -> Generator[str]:
    """The URL of a server that lives as long as the block."""
    binaries = Path(subprocess.check_output(["pg_config", "--bindir"], text=True).strip())
    with postgres.running_postgres(binaries, "-c max_connections=200") as server:
        yield server.url


def new_database(server: str) -> str:
    """The URL of an empty database on this server."""
    name = f"bench_{uuid4().hex}"

    async def create() -> None:
        connection = await asyncpg.connect(f"{server}/postgres")
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(create())
    return f"{server}/{name}"
