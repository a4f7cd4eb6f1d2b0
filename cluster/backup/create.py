"""Make a backup."""

import os
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

from cluster import durable, storage
from cluster.backup import archive, content, names, snapshot
from cluster.backup.archive import ArchiveWriter
from cluster.backup.encryption import Key
from cluster.backup.errors import BackupExists, BackupFailed
from cluster.backup.manifest import Header
from cluster.backup.snapshot import Snapshot
from cluster.db import now
from cluster.files.disk import gigabytes, require_space
from cluster.settings import home

TAR_BYTES_PER_FILE = 1024
"""At most, with the padding."""

OnStep = Callable[[str, str], None]
OnProgress = Callable[[float], None]
"""Called with the percentage of the files that are written."""


@dataclass(frozen=True)
class BackupResult:
    path: Path
    bytes: int
    file_count: int
    header: Header


async def create(
    path: Path,
    passphrase: str | None,
    on_step: OnStep = lambda step, detail: None,
    on_progress: OnProgress = lambda percent: None,
) -> BackupResult:
    """Make a backup of this installation, which may run. With a folder as path, it gets a name with the time.

    Without a passphrase it is not encrypted, and has no secrets.
    """
    created_at = now()
    _require_new(path, or_folder=True)
    async with snapshot.take(with_secrets=passphrase is not None) as taken:
        target = _target(path, created_at)
        _require_new(target)
        header = Header(
            version=version("forgearr"),
            revision=taken.revision,
            engine=taken.engine,
            created_at=created_at,
            is_encrypted=passphrase is not None,
            has_secrets=passphrase is not None,
            mlflow=taken.mlflow,
            content_bytes=sum(file.stat().st_size for file in taken.files.values()),
        )
        on_step("snapshot", f"{taken.engine}, {len(taken.files)} files, {gigabytes(header.content_bytes)}")
        needed = header.content_bytes + TAR_BYTES_PER_FILE * len(taken.files)
        require_space(target.parent, needed, "The backup")
        try:
            with _new_file(target) as file:
                _write(file, header, taken, passphrase, on_progress)
                size = file.tell()
        except OSError as error:
            raise BackupFailed(f"The backup could not be written: {error}.") from error
    on_step("written", f"{target}, {gigabytes(size)}, {'encrypted' if header.is_encrypted else 'not encrypted'}")
    return BackupResult(target, size, len(taken.files), header)


def _write(file: BinaryIO, header: Header, taken: Snapshot, passphrase: str | None, on_progress: OnProgress) -> None:
    writer = ArchiveWriter(file)
    writer.add(archive.HEADER, header.model_dump_json(indent=2).encode())
    with ExitStack() as stack:
        if passphrase is None:
            target = stack.enter_context(writer.member(archive.PLAIN))
        else:
            key = Key.new()
            writer.add(archive.IDENTITY, key.lock(passphrase))
            target = stack.enter_context(key.encrypting(stack.enter_context(writer.member(archive.ENCRYPTED))))
        content.write(
            target,
            taken.files,
            str(home()),
            str(storage.local_root()),
            _in_percent(header.content_bytes, on_progress),
        )
    writer.finish()


def _in_percent(total: int, on_progress: OnProgress) -> content.OnBytes:
    """Calls `on_progress` once for each percent."""
    last = -1

    def on_bytes(done: int) -> None:
        nonlocal last
        percent = 100 * done // max(total, 1)
        if percent > last:
            last = percent
            on_progress(percent)

    return on_bytes


@contextmanager
def _new_file(target: Path) -> Generator[BinaryIO]:
    """A file that gets its name when it is on the disk, and never replaces another one."""
    draft = target.with_name(names.draft_name(target.name))
    draft.unlink(missing_ok=True)  # of a backup that was killed
    try:
        descriptor = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        _require_new(target)
        draft.replace(target)
        durable.sync(target.parent)
    finally:
        with suppress(OSError):
            draft.unlink(missing_ok=True)


def _target(path: Path, created_at: datetime) -> Path:
    if not path.is_dir():
        return path
    names.remove_unfinished(path)
    return path / names.new_name(created_at)


def _require_new(target: Path, *, or_folder: bool = False) -> None:
    if or_folder and target.is_dir():
        return
    if target.exists():
        raise BackupExists(f"{target} exists already. Choose another name, or a folder.")
    if not target.parent.is_dir():
        raise BackupFailed(f"There is no folder {target.parent}.")
