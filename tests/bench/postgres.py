"""A PostgreSQL of its own for a benchmark, as durable as it comes."""

import asyncio
import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import asyncpg

from tests.support.platform import unused_ports


@contextmanager
def running_postgres() -> Generator[str]:
    """The URL of a server that lives as long as the block."""
    binaries = Path(subprocess.check_output(["pg_config", "--bindir"], text=True).strip())
    folder = Path(tempfile.mkdtemp(prefix="forgearr-bench-", dir="/tmp"))
    user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
    if user:
        shutil.chown(folder, user)
    (port,) = unused_ports(1)
    options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories={folder} -c max_connections=200"

    def run(program: str, *arguments: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    run("initdb", "--username=postgres", "--auth=trust", "--encoding=UTF8")
    run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}"
    finally:
        run("pg_ctl", "-w", "-m", "immediate", "stop")
        shutil.rmtree(folder)


def new_database(server: str) -> str:
    """The URL of an empty database on this server."""
    name = f"bench_{uuid4().hex}"

    async def create() -> None:
        connection = await asyncpg.connect(f"{server}/postgres")
        await connection.execute(f"CREATE DATABASE {name}")
        await connection.close()

    asyncio.run(create())
    return f"{server}/{name}"
