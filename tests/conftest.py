"""Fixtures of the whole suite: a home of its own for each test, and the database on both engines."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import cast
from uuid import uuid4

import asyncpg
import httpx
import pytest
from fastapi.dependencies import models
from sqlalchemy.engine import make_url

from cluster import embedded, storage, tracking
from cluster.db import Database, get_database, migrate
from cluster.settings import get_settings, load_settings
from tests.pipelines.shelf import Shelf

ENGINES = ["sqlite", "postgres"]
# Before anybody imports torch: its threads wait for each other at every step, and on two cores that are shared with
# other tests they do little else.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _let_go_of_applications() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """FastAPI remembers each function that it has looked into, and those of /docs hold a whole application. A process
    that keeps the applications of a thousand tests stops for seconds whenever Python looks for garbage."""
    yield
    for value in vars(models).values():
        if forget := getattr(value, "cache_clear", None):
            forget()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh FORGEARR_HOME, with nothing configured."""
    for variable in [name for name in os.environ if name.startswith("FORGEARR_")]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "home"
    monkeypatch.setenv("FORGEARR_HOME", str(folder))
    _forget_settings()
    yield folder
    _forget_settings()


@pytest.fixture(params=ENGINES)
async def database(
    request: pytest.FixtureRequest, home: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Database]:
    """An empty database with the newest schema; it is also what get_database() returns, here and in child processes."""
    if request.param == "postgres":
        server = cast(str, request.getfixturevalue("postgres_server"))
        monkeypatch.setenv("FORGEARR_DATABASE__URL", await new_postgres_database(server))
    database = get_database()
    await migrate()
    yield database
    await database.close()


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[str]:
    """The URL of a PostgreSQL that lives as long as the test session."""
    binaries = _postgres_binaries()
    folder = Path(tempfile.mkdtemp(prefix="forgearr-pg-", dir="/tmp"))
    user = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
    if user:
        shutil.chown(folder, user)
    port = _free_port()
    options = f"-c listen_addresses=127.0.0.1 -p {port} -c unix_socket_directories={folder} -c fsync=off"

    def run(program: str, *arguments: str) -> None:
        command = [str(binaries / program), "-D", str(folder / "data"), *arguments]
        subprocess.run(command, user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL, timeout=60)

    run("initdb", "--username=postgres", "--auth=trust", "--no-sync", "--encoding=UTF8")
    run("pg_ctl", "-w", "-l", str(folder / "log"), "-o", options, "start")
    yield f"postgresql://postgres@127.0.0.1:{port}"
    run("pg_ctl", "-w", "-m", "immediate", "stop")
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[str]:
    """The URL of an MLflow server that lives as long as the test session; whoever uses it names things of its own."""
    folder = Path(tempfile.mkdtemp(prefix="forgearr-mlflow-", dir="/tmp"))
    port = _free_port()
    variables = {"FORGEARR_HOME": str(folder), "FORGEARR_MLFLOW__PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        command = embedded.mlflow_command(load_settings().settings)
        environment = embedded.mlflow_environment()
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    _wait_for_mlflow(server, f"http://127.0.0.1:{port}", folder / "log")
    yield f"http://127.0.0.1:{port}"
    server.terminate()
    server.wait(20)
    shutil.rmtree(folder)


@pytest.fixture
async def shelf(
    home: Path, tmp_path: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shelf]:
    """A model of its own in the registry of this installation, which has no version yet."""
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", mlflow_server)
    get_settings.cache_clear()
    async with tracking.connect(mlflow_server) as mlflow:
        yield Shelf(mlflow, tmp_path)


async def new_postgres_database(server: str) -> str:
    name = f"test_{uuid4().hex}"
    connection = await asyncpg.connect(f"{server}/postgres")
    await connection.execute(f"CREATE DATABASE {name}")
    await connection.close()
    return make_url(server).set(database=name).render_as_string(hide_password=False)


def _postgres_binaries() -> Path:
    if shutil.which("pg_config"):
        folder = Path(subprocess.check_output(["pg_config", "--bindir"], text=True).strip())
        if (folder / "initdb").exists():
            return folder
    reason = "PostgreSQL is not installed (pg_config --bindir has no initdb), so nothing is tested on it."
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


def _wait_for_mlflow(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").is_success:
                return
        time.sleep(0.1)
    server.kill()
    pytest.fail(f"MLflow did not start:\n{log.read_text()}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _forget_settings() -> None:
    get_settings.cache_clear()
    get_database.cache_clear()
    storage._root.cache_clear()  # pyright: ignore[reportPrivateUsage]
