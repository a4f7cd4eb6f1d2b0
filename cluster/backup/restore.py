"""Restore a backup onto an empty installation. Until everything is known to be right, nothing is changed."""

import os
import shutil
import tempfile
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.engine import make_url

from cluster import migrations
from cluster.backup import archive, content, postgres, sqlite
from cluster.backup.archive import Archive
from cluster.backup.encryption import Key
from cluster.backup.errors import BackupNewer, NotEmpty, RestoreFailed
from cluster.backup.manifest import Header, Manifest, Replacements
from cluster.backup.snapshot import DATABASE, LOCK_NAMES, MLFLOW_DATABASE
from cluster.files.disk import require_space
from cluster.runtime import run_state
from cluster.settings import Settings, home, load_settings

STAGING_PREFIX = ".restore-"
HARMLESS = {"backups", "forgearr.yaml", "logs", "run"}
"""What FORGEARR_HOME may contain before."""
SPARE = 1.02
"""Files take whole blocks of a disk."""

OnStep = Callable[[str, str], None]
AskPassphrase = Callable[[], str]


@dataclass(frozen=True)
class RestoreResult:
    header: Header
    kept_settings: bool
    """Whether FORGEARR_HOME had a forgearr.yaml, which stays."""
    was_elsewhere: Path | None
    """The FORGEARR_HOME of the backup, if it had another path."""


async def restore(
    path: Path, ask_passphrase: AskPassphrase, on_step: OnStep = lambda step, detail: None
) -> RestoreResult:
    with archive.open_archive(path) as opened:
        header = opened.header
        if header.revision not in migrations.known_revisions():
            raise BackupNewer(
                f"The backup {path} was made by Forgearr {header.version}, with a database (schema {header.revision}) "
                "that this version does not know: install that version, and restore it there."
            )
        on_step("checked", f"{path}: Forgearr {header.version}, made at {header.created_at:%Y-%m-%d %H:%M} UTC")
        with run_state.exclusive_lock(), _staging() as staging:
            _require_empty(home(), HARMLESS)
            require_space(home(), int(header.content_bytes * SPARE), "The restored installation")
            key = Key.open(opened.read(archive.IDENTITY), ask_passphrase()) if header.is_encrypted else None
            manifest = _extract(opened, key, staging)
            on_step("verified", f"{len(manifest.files)} files")
            return await _put_in_place(header, manifest, staging, on_step)


def _extract(opened: Archive, key: Key | None, staging: Path) -> Manifest:
    with ExitStack() as stack:
        if key is None:
            source = opened.open(archive.PLAIN)
        else:
            source = stack.enter_context(key.decrypting(opened.open(archive.ENCRYPTED)))
        return content.extract(source, staging)


async def _put_in_place(header: Header, manifest: Manifest, staging: Path, on_step: OnStep) -> RestoreResult:
    user_file = home() / "forgearr.yaml"
    kept_settings = user_file.exists()
    settings = load_settings(user_file=user_file if kept_settings else staging / "forgearr.yaml").settings
    await _require_empty_database(header, settings)
    root = _require_empty_storage(settings, staging)
    replacements = _replacements(manifest, root)
    if header.engine == "SQLite":
        sqlite.replace_addresses(staging / DATABASE, replacements)
    if header.mlflow == "included":
        sqlite.replace_addresses(staging / MLFLOW_DATABASE, replacements)
    os.sync()  # what gets its name now is on the disk
    if header.engine == "PostgreSQL":  # first, because it is what may fail
        await postgres.restore(settings.database_url, staging / DATABASE)
        await postgres.replace_addresses(settings.database_url, replacements)
        (staging / DATABASE).unlink()
    _move_into(staging / "storage", root)
    on_step("storage", str(root))
    for name in ("mlflow", "keys", "forgearr.yaml"):
        if (staging / name).exists() and not (home() / name).is_file():
            _move_into(staging / name, home() / name)
    if header.engine == "SQLite":  # last: without it, `forgearr up` would begin with an empty one
        (staging / DATABASE).rename(_sqlite_path(settings))
    os.sync()
    on_step("database", header.engine)
    moved = Path(manifest.home) if manifest.home != str(home()) else None
    return RestoreResult(header, kept_settings, moved)


async def _require_empty_database(header: Header, settings: Settings) -> None:
    is_sqlite = settings.database_url.startswith("sqlite")
    if is_sqlite != (header.engine == "SQLite"):
        raise RestoreFailed(
            f"The backup has a database of {header.engine}, and database.url names one of "
            f"{'SQLite' if is_sqlite else 'PostgreSQL'}: set database.url before you restore."
        )
    if is_sqlite and _sqlite_path(settings).exists():
        raise NotEmpty(f"There is a database {_sqlite_path(settings)} already.")
    if not is_sqlite:
        postgres.require_restore()
        if await postgres.has_tables(settings.database_url):
            raise NotEmpty("The database that database.url names has tables already. Create an empty one.")


def _require_empty_storage(settings: Settings, staging: Path) -> Path:
    """Returns the folder of storage."""
    if "://" in settings.storage_url:
        raise RestoreFailed("storage.url names a bucket, and backups are restored to folders only.")
    root = Path(settings.storage_url).absolute()
    _require_empty(root, set())
    existing = next(folder for folder in (root, *root.parents) if folder.exists())
    if existing.stat().st_dev != staging.stat().st_dev:  # files are copied there
        size = sum(path.stat().st_size for path in (staging / "storage").rglob("*"))
        require_space(existing, int(size * SPARE), "The restored storage")
    return root


def _require_empty(folder: Path, harmless: set[str]) -> None:
    """Empty folders do not count."""
    if not folder.exists():
        return
    found = sorted(
        path.name
        for path in folder.iterdir()
        if path.name not in harmless and not path.name.startswith(STAGING_PREFIX) and _has_files(path)
    )
    if found:
        raise NotEmpty(
            f"{folder} is not empty: it has {', '.join(found[:5])}{' and more' if len(found) > 5 else ''}. A backup is "
            "restored onto an empty installation only, so that nothing is lost: move the folder away, or set "
            "FORGEARR_HOME to another one."
        )


def _has_files(path: Path) -> bool:
    if path.is_dir():
        return any(_has_files(child) for child in path.iterdir())
    return path.name not in LOCK_NAMES


def _replacements(manifest: Manifest, root: Path) -> Replacements:
    """From the folders of the backup to ours. A folder may be inside of another one, so names of neither come first."""
    pairs = {f"{manifest.storage}/": f"{root}/", f"{manifest.home}/": f"{home()}/"}
    moved = [(old, f"forgearr-restore-{index}/", new) for index, (old, new) in enumerate(pairs.items()) if old != new]
    return [(old, between) for old, between, _ in moved] + [(between, new) for _, between, new in moved]


def _move_into(source: Path, target: Path) -> None:
    """Move a file or a folder. There may be empty folders already."""
    if source.is_dir() and target.is_dir():
        for path in source.iterdir():
            _move_into(path, target / path.name)
    elif source.exists():
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.move(source, target)


def _sqlite_path(settings: Settings) -> Path:
    return Path(make_url(settings.database_url).database or "")


@contextmanager
def _staging() -> Generator[Path]:
    """Also what an earlier restore has left that was killed: it holds the same lock."""
    for leftover in home().glob(f"{STAGING_PREFIX}*"):
        shutil.rmtree(leftover)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=home()))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
