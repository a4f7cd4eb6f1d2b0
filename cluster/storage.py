"""File storage, in a folder that all nodes share or in a bucket, with the same functions for both.

What a function has stored outlasts a power cut.
"""

from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster import durable
from cluster.settings import get_settings

CHUNK_BYTES = 1024 * 1024


class Disk(LocalFileSystem):
    """The file system of a folder, with what it takes that stored files outlast a power cut."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        folder = Path(path)
        missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        super().makedirs(path, exist_ok=exist_ok)
        for new in missing:
            self.sync(str(new.parent))

    def replace(self, source: str, target: str) -> None:
        Path(source).replace(target)

    def sync(self, path: str) -> None:
        durable.sync(Path(path))


def save(source: Path, name: str) -> str:
    """Copy a file, or a folder with its contents, into storage under `name` (jobs/ID/report.md).

    Returns its address. What was stored under that name before is replaced.
    """
    filesystem, root = _filesystem_and_root()
    target = f"{root}/{name}"
    if source.is_dir():
        remove(target)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            save(file, f"{name}/{file.relative_to(source).as_posix()}")
        return target
    if isinstance(filesystem, Disk):
        with source.open("rb") as content:
            return write(content, name)
    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    filesystem.put_file(str(source), target)
    return target


def write(source: BinaryIO, name: str) -> str:
    """Copy the rest of a stream into storage, in chunks. Returns its address."""
    file = StorageWriter(name)
    try:
        while chunk := source.read(CHUNK_BYTES):
            file.write(chunk)
        return file.commit()
    except BaseException:
        file.discard()
        raise


class StorageWriter:
    """Writes a file into storage in chunks. The file becomes visible, as a whole, on commit.

    Its methods block on a disk or a network.
    """

    def __init__(self, name: str) -> None:
        self._filesystem, root = _filesystem_and_root()
        self._target = f"{root}/{name}"
        self._folder = self._target.rpartition("/")[0]
        self._filesystem.makedirs(self._folder, exist_ok=True)
        # A bucket shows a file only when it is committed. In a folder, it has a temporary name until then.
        self._is_local = isinstance(self._filesystem, Disk)
        self._temporary_path = f"{self._target}.{token_hex(4)}.part" if self._is_local else self._target
        open_options = {} if self._is_local else {"autocommit": False}
        self._file: Any = self._filesystem.open(self._temporary_path, "wb", **open_options)

    def write(self, content: bytes) -> None:
        self._file.write(content)

    def commit(self) -> str:
        """Make the file visible, instead of what was stored under its name. Returns its address."""
        self._file.close()
        if self._is_local:
            self._filesystem.sync(self._temporary_path)
            self._filesystem.replace(self._temporary_path, self._target)
            self._filesystem.sync(self._folder)
        else:
            self._file.commit()
        return self._target

    def discard(self) -> None:
        """Delete what was written."""
        if not self._is_local:
            self._file.discard()
            return
        try:
            self._file.close()
        finally:
            remove(self._temporary_path)


def address(name: str) -> str:
    """Return the address of a name in storage, whether or not it exists."""
    _, root = _filesystem_and_root()
    return f"{root}/{name}"


def exists(address: str) -> bool:
    filesystem, _ = _filesystem_and_root()
    return filesystem.exists(address)


def find(name: str) -> list[str]:
    """Return the addresses of all files whose names begin with this folder."""
    filesystem, root = _filesystem_and_root()
    return filesystem.find(f"{root}/{name}")


def size(address: str) -> int:
    """Return the size of a file in bytes."""
    filesystem, _ = _filesystem_and_root()
    return filesystem.size(address)


def read(address: str) -> bytes:
    filesystem, _ = _filesystem_and_root()
    return filesystem.cat_file(address)


def open_file(address: str) -> BinaryIO:
    """Open a stored file, to read it in chunks or line by line."""
    filesystem, _ = _filesystem_and_root()
    return filesystem.open(address, "rb")


def fetch(address: str, folder: Path) -> Path:
    """Return a local path of a stored file or folder: the stored one if it is on a disk, else a copy in `folder`.

    The caller may read it, but must not write to it.
    """
    filesystem, _ = _filesystem_and_root()
    if isinstance(filesystem, Disk):
        if not Path(address).exists():
            raise FileNotFoundError(f"{address} is not in storage")
        return Path(address)
    target = folder / address.rpartition("/")[2]
    filesystem.get(address, str(target), recursive=True)
    return target


def remove(address: str) -> None:
    """Delete a file or a folder. A missing one is no error."""
    filesystem, _ = _filesystem_and_root()
    if filesystem.exists(address):
        filesystem.rm(address, recursive=True)


@cache
def _filesystem_and_root() -> tuple[Any, str]:
    filesystem, root = fsspec.core.url_to_fs(get_settings().storage_url)
    return Disk() if type(filesystem) is LocalFileSystem else filesystem, root.rstrip("/")
