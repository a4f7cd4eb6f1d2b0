"""Check this machine and this installation, and suggest fixes, for `forgearr doctor`. It changes nothing."""

import asyncio
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Literal

import psutil

from cluster import logs, storage
from cluster.errors import ForgearrError, SettingsError
from cluster.runtime import haproxy, privacy, probes, processes, run_state, supervisor
from cluster.secrets import KeyDamaged, check_keys, has_old_sealing_key
from cluster.settings import Settings, home, mask_url

if TYPE_CHECKING:
    from cluster.sealing import SealedSecret

GB = 1_000_000_000
DISK_GB = 5
MEMORY_GB = 4
COMMAND_TIMEOUT_SECONDS = 30


@dataclass(frozen=True)
class CheckResult:
    level: Literal["ok", "warn", "fail"]
    subject: str
    text: str
    fix: str = ""


def run_checks(settings: Settings) -> Iterator[CheckResult]:
    yield _python()
    yield from _packages()
    yield from _home()
    yield from _keys()
    yield _disk()
    yield _memory()
    yield from _ports(settings)
    yield _haproxy()
    yield _git()
    if settings.ray.address:
        yield _cluster(settings.ray.address)
    yield _storage(settings)
    yield _database(settings)
    yield from _secrets(settings)
    yield _mlflow(settings)
    yield _gpu()


def _cluster(address: str) -> CheckResult:
    if processes.is_reachable(address):
        return CheckResult("ok", "cluster", f"answers at {address}")
    return CheckResult(
        "fail", "cluster", f"nothing answers at {address}", "Start that cluster, or correct ray.address."
    )


def _python() -> CheckResult:
    text = f"{platform.python_version()} at {sys.executable}"
    if sys.prefix == sys.base_prefix:
        return CheckResult("warn", "python", text, "Use a virtual environment, as `make setup` does.")
    return CheckResult("ok", "python", text)


def _packages() -> Iterator[CheckResult]:
    for name in ("ray", "mlflow"):
        try:
            yield CheckResult("ok", name, version(name))
        except PackageNotFoundError:
            yield CheckResult("fail", name, "not installed", "Run `make setup`.")


def _home() -> Iterator[CheckResult]:
    exposed = list(privacy.readable_by_others())
    for path, mode in exposed:
        subject = "home" if path == home() else "keys"
        yield CheckResult("fail", subject, f"{path} can be read by other accounts", f"Run `chmod {mode} {path}`.")
    if not exposed:
        yield CheckResult("ok", "home", str(home()))


def _keys() -> Iterator[CheckResult]:
    try:
        check_keys()
    except KeyDamaged as error:
        problem, _, fix = error.message.partition(". ")
        yield CheckResult("fail", "keys", problem, fix)


def _disk() -> CheckResult:
    free = shutil.disk_usage(home()).free / GB
    text = f"{free:.0f} GB free at {home()}"
    if free < DISK_GB:
        return CheckResult(
            "warn", "disk", text, f"Free some space: models and checkpoints need more than {DISK_GB} GB."
        )
    return CheckResult("ok", "disk", text)


def _memory() -> CheckResult:
    memory = psutil.virtual_memory()
    text = f"{memory.available / GB:.0f} GB available of {memory.total / GB:.0f} GB"
    if memory.available < MEMORY_GB * GB and run_state.current_run() is None:
        return CheckResult("warn", "memory", text, f"Ray, MLflow and the gateway need about {MEMORY_GB} GB together.")
    return CheckResult("ok", "memory", text)


def _ports(settings: Settings) -> Iterator[CheckResult]:
    run = run_state.current_run()
    for setting, (host, port) in supervisor.listen_addresses(settings).items():
        if run and port in run.ports:
            yield CheckResult("ok", "port", f"{port} ({setting}) is in use by the running Forgearr")
            continue
        try:
            processes.require_free_port(host, port, setting)
            yield CheckResult("ok", "port", f"{port} ({setting}) is free")
        except processes.PortUnavailable as error:
            yield CheckResult("fail", "port", f"{port} ({setting}) cannot be used", error.message)


def _haproxy() -> CheckResult:
    binary = haproxy.bundled_binary()
    if binary is None:
        text = "not available here, so Ray Serve's own proxy is used: it is about five times slower"
        fix = "Run `make setup`." if sys.platform == "linux" else "HAProxy comes with Forgearr on Linux only."
        return CheckResult("warn", "haproxy", text, fix)
    result = _run(str(binary), "-v")
    if result.returncode:
        return CheckResult("fail", "haproxy", f"{binary} does not run: {result.stderr.strip()}", "Run `make setup`.")
    return CheckResult("ok", "haproxy", result.stdout.split(" ")[2])


def _git() -> CheckResult:
    program = shutil.which("git")
    if program is None:
        fix = "Install git to retrain models from repositories."
        return CheckResult("warn", "git", "not installed, so no repository can be read", fix)
    result = _run(program, "--version")
    if result.returncode:
        return CheckResult("warn", "git", f"{program} does not run: {result.stderr.strip()}", "Reinstall git.")
    return CheckResult("ok", "git", result.stdout.strip().removeprefix("git version "))


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run a command and return its output. A timeout is returned as a failure."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer within {COMMAND_TIMEOUT_SECONDS} seconds")


def _storage(settings: Settings) -> CheckResult:
    try:
        storage.check()
    except ForgearrError as error:
        fix = "Check its name, its region, AWS_ENDPOINT_URL, and the credentials in the environment or in ~/.aws."
        return CheckResult("fail", "storage", error.message, "" if isinstance(error, SettingsError) else fix)
    return CheckResult("ok", "storage", settings.storage_url)


def _database(settings: Settings) -> CheckResult:
    """Check that the database is reachable, and that this code knows its schema."""
    from sqlalchemy.exc import SQLAlchemyError

    if settings.database.url is None and not (home() / "forgearr.db").exists():
        return CheckResult("ok", "database", "SQLite; the first `forgearr up` creates it")
    try:
        current, known = asyncio.run(_schema_versions())
    except (SQLAlchemyError, OSError) as error:
        reason = logs.redact(str(error).strip().partition("\n")[0])
        fix = "Check database.url, and that the database runs."
        return CheckResult("fail", "database", f"cannot be reached: {reason}", fix)
    if current is None:
        return CheckResult("ok", "database", "empty; `forgearr up` creates its tables")
    if current not in known:
        fix = "Install that version again, or restore an older backup."
        return CheckResult("fail", "database", f"schema {current} was written by a newer version of Forgearr", fix)
    pending = "" if current == known[0] else f"; `forgearr up` migrates it to {known[0]}"
    return CheckResult("ok", "database", f"schema {current}{pending}")


async def _schema_versions() -> tuple[str | None, list[str]]:
    """Return the version of the database's schema, and the versions that this code knows, newest first."""
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory
    from sqlalchemy import Connection

    from cluster.db import get_database
    from cluster.migrations import configuration

    def read(connection: Connection) -> tuple[str | None, list[str]]:
        scripts = ScriptDirectory.from_config(configuration(connection))
        known = [script.revision for script in scripts.walk_revisions()]
        return MigrationContext.configure(connection).get_current_revision(), known

    try:
        async with get_database().engine.connect() as connection:
            return await connection.run_sync(read)
    finally:
        await get_database().close()


def _secrets(settings: Settings) -> Iterator[CheckResult]:
    """Check that all sealed secrets can be opened, if the database has the schema of this code."""
    from sqlalchemy.exc import SQLAlchemyError

    if settings.database.url is None and not (home() / "forgearr.db").exists():
        return
    try:
        unreadable = asyncio.run(_find_unreadable())
    except (SQLAlchemyError, OSError, ForgearrError):
        return  # another check tells why
    if unreadable:
        text = f"{len(unreadable)} stored secrets cannot be opened with the sealing key"
        yield CheckResult(
            "warn", "secrets", text, "Run `forgearr keys check`: it lists them, and how to enter them again."
        )
    elif has_old_sealing_key():
        fix = "Run `forgearr keys rotate`, while Forgearr does not run, to finish its replacement."
        yield CheckResult("warn", "secrets", "an old sealing key is accepted too", fix)
    else:
        yield CheckResult("ok", "secrets", "all stored secrets can be opened")


async def _find_unreadable() -> "list[SealedSecret]":
    from cluster import sealing
    from cluster.db import get_database
    from cluster.migrations import import_tables

    import_tables()
    try:
        async with get_database().read_transaction() as session:
            return await sealing.find_unreadable(session)
    finally:
        await get_database().close()


def _mlflow(settings: Settings) -> CheckResult:
    if settings.mlflow_uri is None:
        return CheckResult("ok", "mlflow", "off (mlflow.enabled)")
    address = mask_url(settings.mlflow_uri)
    if probes.is_mlflow_up(settings.mlflow_uri):
        return CheckResult("ok", "mlflow", f"answers at {address}")
    if not settings.has_own_mlflow:
        fix = "Start that server, or unset mlflow.tracking_uri. Runs are recorded as soon as it answers."
        return CheckResult("warn", "mlflow", f"does not answer at {address}", fix)
    if run_state.current_run():
        return CheckResult("warn", "mlflow", "does not answer (yet)", f"See {home() / 'logs' / 'mlflow.log'}.")
    return CheckResult("ok", "mlflow", "starts with `forgearr up`")


def _gpu() -> CheckResult:
    program = shutil.which("nvidia-smi")
    if program is None:
        return CheckResult("ok", "gpu", "none: CPU only")
    result = _run(program, "--query-gpu=name,memory.total", "--format=csv,noheader")
    if result.returncode:
        text = f"nvidia-smi fails: {(result.stdout + result.stderr).strip()}"
        return CheckResult("warn", "gpu", text, "Check the NVIDIA driver; until then jobs run on the CPU.")
    return CheckResult("ok", "gpu", "; ".join(result.stdout.strip().splitlines()))
