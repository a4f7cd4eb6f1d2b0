"""A snapshot of an installation while it runs: its databases, and hard links to its files.

Rows name files, so at one moment all of them have to be there. Storage never changes a file in place: it is written
under another name first. What could take one away is a deletion. So deletions are held, for as long as it takes to
begin a transaction in the database, to copy MLflow's database, and to link the files. Nothing else waits, and nothing
at all while the snapshot is read.
"""

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url

from cluster import storage
from cluster.backup import postgres, sqlite
from cluster.backup.errors import BackupFailed, BackupRunning
from cluster.backup.manifest import Engine, MlflowPart
from cluster.files.disk import require_space
from cluster.runtime import run_state
from cluster.settings import get_settings, home

STAGING_PREFIX = ".backup-"
LOCK_NAME = ".backups.lock"
LOCK_NAMES = {LOCK_NAME, storage.DELETIONS_LOCK}
"""Empty files in storage, which belong to no row."""
UNFINISHED_SUFFIX = ".part"
DATABASE, MLFLOW_DATABASE = "database", "mlflow/mlflow.db"
NO_LINKS = {errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS}


@dataclass(frozen=True)
class Snapshot:
    files: dict[str, Path]
    """By their names in the backup."""
    engine: Engine
    revision: str
    mlflow: MlflowPart


@asynccontextmanager
async def take(*, with_secrets: bool) -> AsyncGenerator[Snapshot]:
    """Take a snapshot. Its files may be read in the block."""
    root = storage.local_root()
    if root is None:
        raise BackupFailed("storage.url names a bucket, and only folders can be backed up.")
    with _one_at_a_time(root):
        _remove_leftovers(root)
        with _staging(home()) as staging, _staging(root) as links:
            yield await _take(root, staging, links, with_secrets=with_secrets)


def remove_leftovers() -> None:
    """Delete what a backup that was killed has left. One that runs keeps its own."""
    root = storage.local_root()
    if root is not None:
        with suppress(BackupRunning), _one_at_a_time(root):
            _remove_leftovers(root)


def _remove_leftovers(root: Path) -> None:
    for folder in (home(), root):
        for staging in folder.glob(f"{STAGING_PREFIX}*"):
            shutil.rmtree(staging)


async def _take(root: Path, staging: Path, links: Path, *, with_secrets: bool) -> Snapshot:
    url = make_url(get_settings().database_url)
    async with AsyncExitStack() as stack:
        # Running jobs do not wait for each other. Without any, nothing is deleted, however long this takes.
        with storage.deletions_held(root, storage.MAX_HOLD_SECONDS if run_state.current_run() else None):
            opened = (
                sqlite.snapshot(Path(url.database or ""))
                if url.get_backend_name() == "sqlite"
                else postgres.snapshot(get_settings().database_url)
            )
            database = await stack.enter_async_context(opened)
            mlflow = _copy_mlflow(staging)
            _link(root, links / "storage")
        require_space(home(), database.size, "The copy of the database")
        await database.save(staging / DATABASE)
    files = {**_files_of(staging), **_files_of(links), **(_secret_files() if with_secrets else {})}
    return Snapshot(files, database.engine, database.revision, mlflow)


def _copy_mlflow(staging: Path) -> MlflowPart:
    """After the database, so that MLflow has all the runs and versions that our rows name."""
    settings, folder = get_settings(), home() / "mlflow"
    if settings.mlflow.enabled and not settings.has_own_mlflow:
        return "elsewhere"
    if not (folder / "mlflow.db").exists():
        return "none"
    require_space(home(), (folder / "mlflow.db").stat().st_size, "The copy of MLflow's database")
    (staging / MLFLOW_DATABASE).parent.mkdir(mode=0o700)
    sqlite.copy(folder / "mlflow.db", staging / MLFLOW_DATABASE)
    _link(folder / "artifacts", staging / "mlflow" / "artifacts")
    return "included"


def _link(source: Path, target: Path) -> None:
    """Make hard links to all files of a folder, or copies where the file system has no links."""
    for folder, subfolders, names in os.walk(source, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(STAGING_PREFIX)]
        copies = target / Path(folder).relative_to(source)
        copies.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in names:
            if name in LOCK_NAMES or name.endswith(UNFINISHED_SUFFIX):
                continue
            with suppress(FileNotFoundError):  # it was temporary
                _link_file(Path(folder, name), copies / name)


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        shutil.copyfile(source, target)


def _files_of(folder: Path) -> dict[str, Path]:
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


def _secret_files() -> dict[str, Path]:
    """The keys, and the settings of the user, which may contain passwords."""
    paths = [home() / "forgearr.yaml", *sorted((home() / "keys").glob("[!.]*"))]
    return {path.relative_to(home()).as_posix(): path for path in paths if path.is_file()}


@contextmanager
def _staging(folder: Path) -> Generator[Path]:
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=folder))  # for this account only
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _one_at_a_time(root: Path) -> Generator[None]:
    """In storage, because a sweep may run on another node than the backup whose files it must not delete."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with os.fdopen(os.open(root / LOCK_NAME, os.O_RDWR | os.O_CREAT, 0o600), "r+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BackupRunning from None
        yield
