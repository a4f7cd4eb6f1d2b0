"""A PostgreSQL of its own on loopback, which can be stopped and started again."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from tests.support.platform import unused_ports
from tests.support.waiting import TIMEOUT


class PostgresServer:
    def __init__(self, folder: Path, binaries: Path, options: str) -> None:
        (port,) = unused_ports(1)
        self.url = f"postgresql://postgres@127.0.0.1:{port}"
        self._folder, self._binaries = folder, binaries
        self._user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
        self._options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories={folder} {options}"
        if self._user:
            shutil.chown(folder, self._user)
        self._run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8")

    def start(self) -> None:
        self._run("pg_ctl", "-w", "-l", str(self._folder / "log"), "-o", self._options, "start")

    def stop(self, mode: str = "fast") -> None:
        """End all connections, and stop. The data stays."""
        self._run("pg_ctl", "-w", "-m", mode, "stop")

    def _run(self, program: str, *arguments: str) -> None:
        command = [str(self._binaries / program), "-D", str(self._folder / "data"), *arguments]
        quiet = subprocess.DEVNULL
        subprocess.run(command, user=self._user, cwd=self._folder, check=True, stdout=quiet, timeout=TIMEOUT)


@contextmanager
def running_postgres(binaries: Path, options: str = "") -> Generator[PostgresServer]:
    """A server that lives as long as the block."""
    folder = Path(tempfile.mkdtemp(prefix="forgearr-pg-", dir="/tmp"))
    try:
        server = PostgresServer(folder, binaries, options)
        server.start()
        try:
            yield server
        finally:
            server.stop("immediate")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
