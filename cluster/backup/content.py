"""The content of a backup: a tar stream of files, and then the manifest with the size and SHA-256 of each."""

import hashlib
import io
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import IO, BinaryIO

from pydantic import ValidationError

from cluster.backup.errors import BackupDamaged, BackupFailed
from cluster.backup.manifest import FileEntry, Manifest

MANIFEST = "manifest.json"
CHUNK_BYTES = 1024 * 1024

OnBytes = Callable[[int], None]
"""Called with the bytes of the files that were written so far."""


def write(target: BinaryIO, files: Mapping[str, Path], home: str, storage: str, on_bytes: OnBytes) -> None:
    entries: dict[str, FileEntry] = {}
    done = 0
    with tarfile.open(fileobj=target, mode="w|", format=tarfile.GNU_FORMAT, bufsize=CHUNK_BYTES) as tar:
        for name, path in files.items():
            entries[name] = _add(tar, name, path, lambda count, before=done: on_bytes(before + count))
            done += entries[name].bytes
        text = Manifest(home=home, storage=storage, files=entries).model_dump_json().encode()
        tar.addfile(_describe(MANIFEST, len(text)), io.BytesIO(text))


def extract(source: BinaryIO, folder: Path) -> Manifest:
    """Write all files below `folder`, and compare each with the manifest."""
    found: dict[str, FileEntry] = {}
    text = b""
    try:
        with tarfile.open(fileobj=source, mode="r|", bufsize=CHUNK_BYTES) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is None or not _is_safe(member.name):
                    raise BackupDamaged(f"The backup contains '{member.name}', which is no file of an installation.")
                if member.name == MANIFEST:
                    text = content.read()
                else:
                    found[member.name] = _write(content, folder / member.name)
        while source.read(CHUNK_BYTES):
            pass  # what decrypts it verifies the last part when that is read
        manifest = Manifest.model_validate_json(text)
    except (tarfile.TarError, ValidationError) as error:
        raise BackupDamaged(f"The content of the backup cannot be read: {error}.") from error
    if wrong := sorted(name for name in {*found, *manifest.files} if found.get(name) != manifest.files.get(name)):
        raise BackupDamaged(f"In the backup {wrong[0]} is not what it was when the backup was made.")
    return manifest


def _add(tar: tarfile.TarFile, name: str, path: Path, on_bytes: OnBytes) -> FileEntry:
    with path.open("rb") as file:
        size = file.seek(0, io.SEEK_END)
        file.seek(0)
        reader = _HashingReader(file, on_bytes)
        try:
            tar.addfile(_describe(name, size), reader)
        except OSError as error:
            if reader.count == size:
                raise
            raise BackupFailed(f"{path} became shorter while it was read; try again.") from error
    return FileEntry(bytes=size, sha256=reader.sha256.hexdigest())


def _describe(name: str, size: int) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info


def _is_safe(name: str) -> bool:
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and path.parts != ()


def _write(content: IO[bytes], path: Path) -> FileEntry:
    _make_folder(path.parent)
    reader = _HashingReader(content)
    with path.open("xb") as file:
        path.chmod(0o600)
        while chunk := reader.read(CHUNK_BYTES):
            file.write(chunk)
    return FileEntry(bytes=reader.count, sha256=reader.sha256.hexdigest())


def _make_folder(folder: Path) -> None:
    """For this account only, also the folders on the way to it."""
    if not folder.exists():
        _make_folder(folder.parent)
        folder.mkdir(mode=0o700)


class _HashingReader(io.RawIOBase):
    """Reads a file, and computes the hash of what was read."""

    def __init__(self, file: IO[bytes], on_bytes: OnBytes = lambda count: None) -> None:
        self._file, self._on_bytes = file, on_bytes
        self.sha256 = hashlib.sha256()
        self.count = 0

    def read(self, size: int = -1, /) -> bytes:
        chunk = self._file.read(size)
        self.sha256.update(chunk)
        self.count += len(chunk)
        self._on_bytes(self.count)
        return chunk
