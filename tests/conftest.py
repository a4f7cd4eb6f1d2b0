"""Fixtures of the whole suite: a home of its own for each test, and the database on both engines."""

import gc
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from functools import cache
from pathlib import Path
from typing import cast
from uuid import uuid4

import asyncpg
import httpx
import hypothesis
import pytest
from fastapi.dependencies import models
from sqlalchemy.engine import make_url
from xdist.remote import Producer
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

from cluster import mlflow_client
from cluster.db import Database, close_threads_database, get_database
from cluster.runtime import embedded
from cluster.secrets import MLFLOW_USER
from cluster.services.http import client
from cluster.settings import get_settings, load_settings
from pipelines.guardian.git import mirrors
from serve.app import create_app
from tests.support.api_client import ApiClient, add_users
from tests.support.platform import unused_ports
from tests.support.registry_model import RegistryModel
from tests.support.storage.forget import forget_storage
from tests.support.storage.postgres import running_postgres
from tests.support.waiting import TIMEOUT, eventually

# No example fails because the machine was busy, and each run tries the same.
SLOW = [hypothesis.HealthCheck.too_slow]
hypothesis.settings.register_profile("ours", deadline=None, derandomize=True, database=None, suppress_health_check=SLOW)
hypothesis.settings.load_profile("ours")
ROOT = Path(__file__).parents[1]
JOURNEYS = "tests/journeys/"
ENGINES = ["sqlite", "postgres"]
MIGRATE = """
import asyncio
from cluster.db import get_database
from cluster.migrations import migrate

async def work():
    await migrate()
    await get_database().close()

asyncio.run(work())
"""
# Before anybody imports torch: its threads wait for each other at every step, and on two cores that are shared with
# other tests they do little else.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# What we ask may be slow here.
mlflow_client.TIMEOUT_SECONDS = mirrors.STALLED_SECONDS = TIMEOUT
client.CONNECT_SECONDS = TIMEOUT


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One more than there are processors, since much of what tests do is waiting. More than four would start more
    platforms than most machines hold."""
    return min(4, (os.cpu_count() or 1) + 1)


class PlatformScheduling(LoadFileScheduling):
    """Half of the workers begin with whole platforms, the others with all else: many platforms beside each other would
    take each other's processors. Those with the fewest tests take the longest, and so go first. The journeys share one
    platform, and so one worker."""

    def _split_scope(self, nodeid: str) -> str:
        return JOURNEYS if nodeid.startswith(JOURNEYS) else super()._split_scope(nodeid)

    def _assign_work_unit(self, node: WorkerController) -> None:
        takes_platforms = self.nodes.index(node) * 2 < len(self.nodes)
        suitable = [scope for scope in self.workqueue if _starts_platforms(scope) == takes_platforms]
        if suitable:
            self.workqueue.move_to_end(suitable[-1 if takes_platforms else 0], last=False)
        super()._assign_work_unit(node)


@cache
def _starts_platforms(scope: str) -> bool:
    return scope == JOURNEYS or "running_platform(" in (ROOT / scope).read_text()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadFileScheduling:
    return PlatformScheduling(config, log)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """PostgreSQL is for the deep tests, but where it is what is tested. Before pytest chooses by markers."""
    for item in items:
        given = item.callspec.params if isinstance(item, pytest.Function) and hasattr(item, "callspec") else {}
        if given.get("database") == "postgres" and not item.get_closest_marker("both_databases"):
            item.add_marker(pytest.mark.deep)


def pytest_collection_finish() -> None:
    """All libraries are loaded now, and stay: looking through them for garbage would take a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _clear_fastapi_caches() -> Iterator[None]:  # pyright: ignore[reportUnusedFunction]
    """FastAPI caches what it knows of each function, and those of /docs refer to a whole application. A process that
    keeps the applications of a thousand tests stops for seconds whenever Python collects garbage."""
    yield
    for value in vars(models).values():
        if clear := getattr(value, "cache_clear", None):
            clear()


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A fresh FORGEARR_HOME, with nothing configured but patience."""
    for variable in [name for name in os.environ if name.startswith("FORGEARR_")]:
        monkeypatch.delenv(variable)
    folder = tmp_path / "home"
    monkeypatch.setenv("FORGEARR_HOME", str(folder))
    monkeypatch.setenv("FORGEARR_SERVICES__TIMEOUT_SECONDS", str(TIMEOUT))
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
        url = await new_postgres_database(server)
        monkeypatch.setenv("FORGEARR_DATABASE__URL", url)
        _forget_settings()  # another fixture may have read them already
        database = get_database()
        yield database
        close_threads_database()
        await database.close()
        await drop_postgres_database(url)
    else:
        request.getfixturevalue("migrated")
        database = get_database()
        yield database
        await database.close()


@pytest.fixture
async def api(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ApiClient]:
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "false")
    get_settings.cache_clear()
    users = await add_users(database)
    api = ApiClient(create_app(), database, users)
    async with api.http:
        yield api


@pytest.fixture
def migrated(home: Path, migrated_sqlite: Path) -> Path:
    """The home, with a SQLite of the newest schema."""
    home.mkdir(mode=0o700, exist_ok=True)
    shutil.copy(migrated_sqlite, home)
    return home


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tests begin with. To migrate it for each of them would take longer than most of them do."""
    home = tmp_path_factory.mktemp("migrated")
    _migrate(FORGEARR_HOME=str(home))
    return home / "forgearr.db"


@pytest.fixture(scope="session")
def postgres_server(postgres_binaries: Path) -> Iterator[str]:
    """The URL of a PostgreSQL that lives as long as the test session, and whose databases begin with our schema."""
    with running_postgres(postgres_binaries, "-c fsync=off") as server, tempfile.TemporaryDirectory() as home:
        _migrate(FORGEARR_HOME=home, FORGEARR_DATABASE__URL=f"{server.url}/template1")
        yield server.url


@pytest.fixture(scope="session")
def postgres_binaries() -> Path:
    """The folder of PostgreSQL's programs. Without them, what needs them is skipped."""
    if shutil.which("pg_config"):
        folder = Path(subprocess.check_output(["pg_config", "--bindir"], text=True).strip())
        if (folder / "initdb").exists():
            return folder
    reason = "PostgreSQL is not installed (pg_config --bindir has no initdb), so nothing is tested on it."
    if os.environ.get("CI") == "true":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    """The URL of an S3 server that lives as long as the test session."""
    (port,) = unused_ports(1)
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        eventually(lambda: httpx.get(f"http://127.0.0.1:{port}/moto-api/").is_success)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(TIMEOUT)


@pytest.fixture
def bucket(home: Path, s3_server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Has storage be in an empty bucket, and returns its URL."""
    name = f"test-{uuid4().hex}"
    for variable in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(variable)
    for variable in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "DEFAULT_REGION"):
        monkeypatch.setenv(f"AWS_{variable}", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    monkeypatch.setenv("FORGEARR_STORAGE__URL", f"s3://{name}/forge/arr")
    httpx.put(f"{s3_server}/{name}").raise_for_status()
    get_settings.cache_clear()
    forget_storage()
    return f"s3://{name}/forge/arr"


@pytest.fixture(params=["folder", "bucket"])
def any_storage(request: pytest.FixtureRequest, home: Path) -> str:
    """The URL of storage: a folder, or a bucket."""
    if request.param == "bucket":
        return request.getfixturevalue("bucket")
    return get_settings().storage_url


@pytest.fixture(scope="session")
def mlflow_server() -> Iterator[str]:
    """The URL of an MLflow server that lives as long as the test session; whoever uses it names things of its own.

    It runs as `forgearr up` starts it, so the URL has the password of its installation.
    """
    folder = Path(tempfile.mkdtemp(prefix="forgearr-mlflow-", dir="/tmp"))
    (port,) = unused_ports(1)
    variables = {"FORGEARR_HOME": str(folder), "FORGEARR_MLFLOW__PORT": str(port)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        command = embedded.mlflow_command(load_settings().settings)
        environment = embedded.mlflow_environment()
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        _wait_for_mlflow(server, f"http://127.0.0.1:{port}", folder / "log")
        yield f"http://{MLFLOW_USER}:{(folder / 'keys' / 'mlflow').read_text()}@127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(TIMEOUT)
        shutil.rmtree(folder)


@pytest.fixture
async def registry_model(
    home: Path, tmp_path: Path, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[RegistryModel]:
    """A model of its own in the registry of this installation, which has no version yet."""
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", mlflow_server)
    get_settings.cache_clear()
    async with mlflow_client.connect(mlflow_server) as mlflow:
        yield RegistryModel(mlflow, tmp_path)


async def new_postgres_database(server: str, template: str = "template1") -> str:
    """Its URL. Only of `template0` will it be empty."""
    name = f"test_{uuid4().hex}"
    await _administer(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    return make_url(server).set(database=name).render_as_string(hide_password=False)


async def drop_postgres_database(url: str) -> None:
    """Whoever still uses it is cut off: what a test has left running must not keep its database."""
    await _administer(url, f"DROP DATABASE {make_url(url).database} WITH (FORCE)")


async def _administer(server: str, statement: str) -> None:
    address = make_url(server).set(database="postgres").render_as_string(hide_password=False)
    connection = await asyncpg.connect(address, timeout=TIMEOUT)
    await connection.execute(statement)
    await connection.close()


def _migrate(**settings: str) -> None:
    """In a process of its own, so that nothing of it is left in this one."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORGEARR_")} | settings
    subprocess.run([sys.executable, "-c", MIGRATE], env=environment, check=True, timeout=TIMEOUT)


def _wait_for_mlflow(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    def healthy() -> bool:
        if server.poll() is not None:
            pytest.fail(f"MLflow did not start:\n{log.read_text()}")
        return httpx.get(f"{url}/health").is_success

    eventually(healthy)


def _forget_settings() -> None:
    close_threads_database()
    get_settings.cache_clear()
    get_database.cache_clear()
    forget_storage()
