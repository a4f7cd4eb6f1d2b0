"""Backups of an installation on both databases, and their restoration onto an empty one."""

import asyncio
import hashlib
import json
import shutil
import sqlite3
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import select

from cluster import backup, migrations, secrets, storage
from cluster.backup.errors import (
    BackupDamaged,
    BackupExists,
    BackupFailed,
    BackupNewer,
    BackupRunning,
    NotEmpty,
    RestoreFailed,
    WrongPassphrase,
)
from cluster.db import Database, DatabaseUnavailable, get_database
from cluster.files.disk import DiskFull
from cluster.ownership import LOCAL
from cluster.runtime import run_state
from cluster.runtime.run_state import AlreadyRunning
from cluster.settings import get_settings, load_settings
from jobs import queue
from jobs.queue import JobRequest
from jobs.tables import Job
from tests.conftest import drop_postgres_database, new_postgres_database
from tests.support.waiting import TIMEOUT

PASSPHRASE = "correct horse battery"
CONTENT = bytes(range(256)) * 2000

NewHome = Callable[[], Awaitable[Path]]


@pytest.fixture
async def new_home(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Any:
    """Go to another FORGEARR_HOME, with an empty database of the same type."""
    urls: list[str] = []

    async def move() -> Path:
        folder = tmp_path / f"home-{uuid4().hex}"
        folder.mkdir(mode=0o700)
        monkeypatch.setenv("FORGEARR_HOME", str(folder))
        if not database.is_sqlite:
            urls.append(await new_postgres_database(request.getfixturevalue("postgres_server"), "template0"))
            monkeypatch.setenv("FORGEARR_DATABASE__URL", urls[-1])
        get_settings.cache_clear()
        storage._filesystem_and_root.cache_clear()  # pyright: ignore[reportPrivateUsage]
        return folder

    yield move
    for url in urls:
        await drop_postgres_database(url)


@pytest.fixture
def other_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on another file system, to which no link is possible."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system")
    folder = Path(tempfile.mkdtemp(dir=shared))
    yield folder
    shutil.rmtree(folder)


async def add_training(database: Database, number: int = 0) -> str:
    """A job whose row names a file in storage, in a JSON document and in a text. Returns its id."""
    name = f"jobs/{number}/token/checkpoint"
    async with database.transaction() as session:
        job = await queue.enqueue(session, JobRequest(kind="probe"), LOCAL)
        job.checkpoint = {"checkpoints": {"7": store(name, CONTENT)}, "sha256": hashlib.sha256(CONTENT).hexdigest()}
        return job.id


def store(name: str, content: bytes) -> str:
    writer = storage.StorageWriter(name)
    writer.write(content)
    return writer.commit()


async def checkpoints() -> dict[str, Any]:
    """The checkpoints of all jobs of the installation that was restored."""
    database = Database(get_settings().database_url)
    async with database.read_transaction() as session:
        found = {job.id: job.checkpoint for job in await session.scalars(select(Job))}
    await database.close()
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock" and path.name != "lock"
    }


def read(address: str) -> bytes:
    return Path(address).read_bytes()


def leftovers(*folders: Path) -> list[Path]:
    return [path for folder in folders for path in folder.rglob(".*-*") if path.is_dir()]


async def restore(path: Path, passphrase: str = PASSPHRASE) -> backup.RestoreResult:
    return await backup.restore(path, lambda: passphrase)


@pytest.mark.both_databases
async def test_an_installation_is_restored_elsewhere(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path
) -> None:
    (home / "forgearr.yaml").write_text("serve:\n  port: 8111\n")
    sealed = secrets.seal("the password of a service")
    job_id = await add_training(database)
    made = await backup.create(tmp_path / "backup.tar", PASSPHRASE)
    assert (made.header.engine, made.header.has_secrets) == ("SQLite" if database.is_sqlite else "PostgreSQL", True)
    assert b"8111" not in made.path.read_bytes()
    assert made.path.stat().st_mode & 0o777 == 0o600
    folder = await new_home()
    (folder / "storage" / "jobs" / "0").mkdir(parents=True)  # empty folders do not matter
    result = await restore(made.path)
    assert result.was_elsewhere == home
    address = (await checkpoints())[job_id]["checkpoints"]["7"]
    assert address == f"{folder}/storage/jobs/0/token/checkpoint"
    assert read(address) == CONTENT
    assert load_settings().settings.serve.port == 8111
    assert secrets.unseal(sealed) == "the password of a service"
    assert leftovers(folder, home) == []
    await migrations_run()


async def migrations_run() -> None:
    """The restored database is one that `up` accepts."""
    get_database.cache_clear()
    await migrations.migrate()
    await get_database().close()


@pytest.mark.both_databases
async def test_what_rows_name_is_there_while_trainings_write_and_delete(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path
) -> None:
    """A training stores a checkpoint, records it, and deletes the one before, all the time."""
    job_id = await add_training(database)
    is_done = threading.Event()

    async def record(number: int, text: bytes) -> None:
        async with database.transaction() as session:
            job = await session.get_one(Job, job_id)
            address = storage.address(f"jobs/{number}/token/checkpoint")
            job.checkpoint = {"checkpoints": {"7": address}, "sha256": hashlib.sha256(text).hexdigest()}

    async def train() -> None:
        number = 0
        while not is_done.is_set():
            number += 1
            text = number.to_bytes(4, "big") * 10_000
            await asyncio.to_thread(store, f"jobs/{number}/token/checkpoint", text)
            await record(number, text)
            await asyncio.to_thread(storage.remove, storage.address(f"jobs/{number - 1}"))

    training = asyncio.create_task(train())
    made = [await asyncio.to_thread(asyncio.run, backup.create(tmp_path / f"{n}.tar", None)) for n in range(5)]
    is_done.set()
    await training
    for result in made:
        folder = await new_home()
        await restore(result.path)
        checkpoint = (await checkpoints())[job_id]
        address = checkpoint["checkpoints"]["7"]
        assert address.startswith(f"{folder}/")
        assert hashlib.sha256(read(address)).hexdigest() == checkpoint["sha256"]


async def test_mlflow_is_in_it(migrated: Path, database: Database, new_home: NewHome, tmp_path: Path) -> None:
    home = migrated
    (home / "mlflow" / "artifacts" / "1").mkdir(parents=True)
    (home / "mlflow" / "artifacts" / "1" / "model.gguf").write_bytes(CONTENT)
    with closing(sqlite3.connect(home / "mlflow" / "mlflow.db")) as connection, connection:
        connection.execute("CREATE TABLE tags (key VARCHAR(250), value TEXT, number INTEGER)")
        rows = [
            ("folder", f"{home}/storage/jobs/1/model", 1),
            ("document", json.dumps({"model": f"{home}/storage/jobs/1/model", "said": f"in {home}/storage/x"}), 2),
            ("text", f"It is in {home}/storage/jobs/1/model", 3),
            ("other", f"{home}-other/storage", 4),
        ]
        connection.executemany("INSERT INTO tags VALUES (?, ?, ?)", rows)
    made = await backup.create(tmp_path / "backup.tar", PASSPHRASE)
    assert made.header.mlflow == "included"
    folder = await new_home()
    await restore(made.path)
    assert (folder / "mlflow" / "artifacts" / "1" / "model.gguf").read_bytes() == CONTENT
    with closing(sqlite3.connect(folder / "mlflow" / "mlflow.db")) as connection:
        restored = dict(connection.execute("SELECT key, value FROM tags").fetchall())
    assert restored["folder"] == f"{folder}/storage/jobs/1/model"
    assert json.loads(restored["document"]) == {
        "model": f"{folder}/storage/jobs/1/model",
        "said": f"in {home}/storage/x",
    }
    assert (restored["text"], restored["other"]) == (rows[2][1], rows[3][1])


async def test_without_secrets_it_has_none_and_is_readable(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path
) -> None:
    (home / "forgearr.yaml").write_text("serve:\n  port: 8111\n")
    key = secrets.signing_key()
    made = await backup.create(tmp_path / "backup.tar", None)
    assert not made.header.has_secrets
    assert key.encode() not in made.path.read_bytes()
    folder = await new_home()
    result = await restore(made.path)
    assert not result.header.has_secrets
    assert not (folder / "forgearr.yaml").exists()
    assert secrets.signing_key() != key


async def test_settings_that_are_there_stay(database: Database, home: Path, new_home: NewHome, tmp_path: Path) -> None:
    (home / "forgearr.yaml").write_text("serve:\n  port: 8111\n")
    await add_training(database)
    made = await backup.create(tmp_path / "backup.tar", PASSPHRASE)
    folder = await new_home()
    ours = f"storage:\n  url: {tmp_path}/shared\n"
    (folder / "forgearr.yaml").write_text(ours)
    assert (await restore(made.path)).kept_settings
    assert (folder / "forgearr.yaml").read_text() == ours
    (address,) = [checkpoint["checkpoints"]["7"] for checkpoint in (await checkpoints()).values()]
    assert address == f"{tmp_path}/shared/jobs/0/token/checkpoint"
    assert read(address) == CONTENT


async def test_what_cannot_be_restored_changes_nothing(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await add_training(database)
    made = await backup.create(tmp_path / "backup.tar", PASSPHRASE)
    whole = made.path.read_bytes()
    folder = await new_home()
    damaged = tmp_path / "damaged.tar"
    for position in (700, 1500, len(whole) // 2, len(whole) - 1800, len(whole) - 1):
        damaged.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(BackupDamaged):
            await restore(damaged)
    damaged.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(BackupDamaged):
        await restore(damaged)
    with pytest.raises(WrongPassphrase):
        await restore(made.path, "another passphrase")
    monkeypatch.setattr(migrations, "known_revisions", lambda: {"0001"})
    with pytest.raises(BackupNewer, match="does not know"):
        await restore(made.path)
    monkeypatch.undo()
    assert contents(folder) == {}


@pytest.mark.parametrize("file", ["forgearr.db", "storage/jobs/1/model", "mlflow/mlflow.db", "keys/sealing", "notes"])
async def test_an_installation_is_never_replaced(
    file: str, database: Database, home: Path, new_home: NewHome, tmp_path: Path
) -> None:
    made = await backup.create(tmp_path / "backup.tar", None)
    folder = await new_home()
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (folder / file).write_text("precious")
    with pytest.raises(NotEmpty, match="is not empty"):
        await restore(made.path)
    assert contents(folder) == {file: b"precious"}


@pytest.mark.both_databases
async def test_a_database_or_storage_elsewhere_has_to_be_empty_too(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await backup.create(tmp_path / "backup.tar", None)
    if not database.is_sqlite:
        before = get_settings().database_url
        folder = await new_home()
        monkeypatch.setenv("FORGEARR_DATABASE__URL", before.replace("+asyncpg", ""))
        get_settings.cache_clear()
        with pytest.raises(NotEmpty, match="has tables already"):
            await restore(made.path)
        assert contents(folder) == {}
    folder = await new_home()
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "file").write_text("precious")
    monkeypatch.setenv("FORGEARR_STORAGE__URL", str(tmp_path / "shared"))
    get_settings.cache_clear()
    with pytest.raises(NotEmpty, match="shared is not empty"):
        await restore(made.path)
    assert contents(folder) == {}


async def test_a_database_of_another_type_is_refused(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = await backup.create(tmp_path / "backup.tar", None)
    folder = await new_home()
    if database.is_sqlite:
        monkeypatch.setenv("FORGEARR_DATABASE__URL", "postgresql://ann@127.0.0.1:9/forgearr")
    else:
        monkeypatch.delenv("FORGEARR_DATABASE__URL")
    with pytest.raises(RestoreFailed, match=f"has a database of {made.header.engine}"):
        await restore(made.path)
    assert contents(folder) == {}


async def test_nothing_is_restored_while_the_installation_runs(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path
) -> None:
    made = await backup.create(tmp_path / "backup.tar", None)
    folder = await new_home()
    with run_state.exclusive_lock(), pytest.raises(AlreadyRunning):
        await restore(made.path)
    assert contents(folder) == {}


async def test_no_file_is_replaced_by_a_backup(database: Database, home: Path, tmp_path: Path) -> None:
    (tmp_path / "backup.tar").write_text("precious")
    with pytest.raises(BackupExists):
        await backup.create(tmp_path / "backup.tar", None)
    assert (tmp_path / "backup.tar").read_text() == "precious"
    with pytest.raises(BackupFailed, match="There is no folder"):
        await backup.create(tmp_path / "missing" / "backup.tar", None)


async def test_a_backup_that_fails_leaves_nothing(
    database: Database, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder").mkdir()
    store("files/one", CONTENT)

    def stop(percent: float) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await backup.create(tmp_path / "folder", PASSPHRASE, on_progress=stop)
    assert [*(tmp_path / "folder").iterdir()] == []
    assert leftovers(home) == []
    monkeypatch.setenv("FORGEARR_STORAGE__MIN_FREE_MB", str(shutil.disk_usage(home).free // 1024**2 + 1024))
    get_settings.cache_clear()
    with pytest.raises(DiskFull):
        await backup.create(tmp_path / "folder", PASSPHRASE)
    assert [*(tmp_path / "folder").iterdir()] == []


async def test_one_backup_is_made_at_a_time_and_cleans_up_after_killed_ones(
    database: Database, home: Path, tmp_path: Path
) -> None:
    store("files/one", CONTENT)
    for folder in (home, home / "storage"):
        (folder / ".backup-killed" / "storage").mkdir(parents=True)
        (folder / ".backup-killed" / "storage" / "file").write_text("of a backup that was killed")
    again: list[str] = []

    def make_another(percent: float) -> None:
        if not again:
            backup.remove_leftovers()  # it runs, so it keeps its files
            again.append("tried")
            thread = threading.Thread(target=second)
            thread.start()
            thread.join(TIMEOUT)

    def second() -> None:
        with pytest.raises(BackupRunning):
            asyncio.run(backup.create(tmp_path / "second.tar", None))
        again.append("refused")

    made = await backup.create(tmp_path / "first.tar", None, on_progress=make_another)
    assert again == ["tried", "refused"]
    assert made.file_count == 2
    assert leftovers(home) == []


async def test_what_a_killed_backup_has_written_is_deleted(database: Database, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    first = await backup.create(folder, None)
    first.path.rename(folder / f".{first.path.name.replace('Z', '0Z')}.part")
    (folder / ".mine.tar.part").touch()
    second = await backup.create(folder, None)
    assert {path.name for path in folder.iterdir()} == {second.path.name, ".mine.tar.part"}


async def test_deletions_that_are_held_too_long_spoil_the_backup(
    database: Database, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only while it runs: else nobody deletes."""
    monkeypatch.setattr(storage, "MAX_HOLD_SECONDS", 0)
    await backup.create(tmp_path / "stopped.tar", None)
    monkeypatch.setattr(run_state, "current_run", lambda: object())
    with pytest.raises(storage.HeldTooLong):
        await backup.create(tmp_path / "running.tar", None)
    assert not (tmp_path / "running.tar").exists()


async def test_storage_on_another_disk_is_copied(
    database: Database, home: Path, new_home: NewHome, tmp_path: Path, other_disk: Path
) -> None:
    await add_training(database)
    shutil.move(home / "storage" / "jobs", other_disk / "jobs")
    (home / "storage" / "jobs").symlink_to(other_disk / "jobs")
    made = await backup.create(tmp_path / "backup.tar", None)
    folder = await new_home()
    await restore(made.path)
    assert (folder / "storage" / "jobs" / "0" / "token" / "checkpoint").read_bytes() == CONTENT


async def test_old_backups_of_the_same_installation_are_deleted(database: Database, home: Path, tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.mkdir()
    made = await backup.create(folder, None)
    prefix = made.path.name.rpartition("-")[0]
    kept = {made.path.name, f"{prefix}-19990101T000000Z.tar", "forgearr-00000000-19980101T000000Z.tar", "notes.txt"}
    old = [f"{prefix}-19980101T00000{second}Z.tar" for second in range(3)]
    for name in [*kept, *old]:
        (folder / name).touch()
    assert [path.name for path in backup.remove_old(folder, 2)] == old[::-1]
    assert {path.name for path in folder.iterdir()} == kept


async def test_a_database_that_is_away_is_named(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_DATABASE__URL", "postgresql://ann:secret@127.0.0.1:9/forgearr")
    get_settings.cache_clear()
    with pytest.raises(DatabaseUnavailable, match="cannot be reached") as raised:
        await backup.create(tmp_path / "backup.tar", PASSPHRASE)
    assert "secret" not in raised.value.message


async def test_without_an_installation_there_is_nothing_to_back_up(home: Path, tmp_path: Path) -> None:
    with pytest.raises(BackupFailed, match="never started"):
        await backup.create(tmp_path / "backup.tar", PASSPHRASE)
    assert contents(home) == {}
