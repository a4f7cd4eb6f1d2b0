"""A disk that fails at one of its operations, or whose power is cut there.

It is a file system of fsspec with the protocol `unreliable`, which storage uses like any other disk. What was not
synced is lost with the power: the content of a file, and the names in a folder. What was deleted stays deleted. A real
disk may keep more.
"""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from cluster import storage
from cluster.settings import get_settings
from cluster.storage import Disk


class PowerCut(BaseException):
    """The machine is off: nothing else can be done, not even in an `except`."""


class UnreliableDisk(Disk):
    protocol = "unreliable"
    cachable = False

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.operations = 0
        self._fails_at: int | None = None
        self._cuts_power = self._is_off = False
        self._unsynced_files: set[str] = set()
        self._unsynced_names: list[tuple[str, Callable[[], object]]] = []  # a folder, and how to undo a change in it

    def fail_at(self, operation: int, *, cut_power: bool) -> None:
        """Fail at this operation from now on, counted from 1: once, or at all later ones too."""
        self.operations, self._fails_at, self._cuts_power = 0, operation, cut_power

    def restart(self, *, lose_unsynced: bool) -> None:
        """Have the next process find what is on the disk."""
        if lose_unsynced:
            for path in self._unsynced_files:
                if Path(path).exists():
                    os.truncate(path, Path(path).stat().st_size // 2)
            for _, undo in reversed(self._unsynced_names):
                undo()
        self._unsynced_files, self._unsynced_names = set(), []
        self._fails_at, self._is_off = None, False

    def operate(self) -> None:
        self.operations += 1
        if self._is_off or (self.operations == self._fails_at and self._cuts_power):
            self._is_off = True
            raise PowerCut
        if self.operations == self._fails_at:
            raise OSError(errno.EIO, "the disk fails")

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        self.operate()
        for folder in (Path(path), *Path(path).parents):
            if not folder.exists():
                undo = lambda folder=folder: shutil.rmtree(folder, ignore_errors=True)  # noqa: E731
                self._unsynced_names.append((str(folder.parent), undo))
        super().makedirs(path, exist_ok=exist_ok)

    def replace(self, source: str, target: str) -> None:
        self.operate()
        previous = Path(target).read_bytes() if Path(target).exists() else None

        def undo() -> None:
            if Path(target).exists():
                Path(target).replace(source)
                if previous is not None:
                    Path(target).write_bytes(previous)

        super().replace(source, target)
        self._unsynced_names.append((str(Path(target).parent), undo))
        if source in self._unsynced_files:
            self._unsynced_files.add(target)

    def sync(self, path: str) -> None:
        self.operate()
        super().sync(path)
        self._unsynced_files.discard(path)
        self._unsynced_names = [change for change in self._unsynced_names if change[0] != path]

    def rm(self, path: Any, recursive: bool = False, maxdepth: int | None = None) -> None:
        self.operate()
        super().rm(path, recursive=recursive, maxdepth=maxdepth)

    def _open(self, path: str, mode: str = "rb", block_size: int | None = None, **options: Any) -> Any:
        if mode == "rb":
            return super()._open(path, mode, block_size, **options)
        self.operate()
        self._unsynced_files.add(path)
        self._unsynced_names.append((str(Path(path).parent), lambda: Path(path).unlink(missing_ok=True)))
        return _UnreliableFile(self, super()._open(path, mode, block_size, **options))

    @classmethod
    def _strip_protocol(cls, path: Any) -> str:
        return super()._strip_protocol(str(path).removeprefix(f"{cls.protocol}://"))


class _UnreliableFile:
    """A file that is being written. Of what is written when the disk fails, half arrives."""

    def __init__(self, disk: UnreliableDisk, file: Any) -> None:
        self._disk = disk
        self._file = file

    def write(self, content: bytes) -> None:
        try:
            self._disk.operate()
        except BaseException:
            self._file.write(content[: len(content) // 2])
            self._file.flush()
            raise
        self._file.write(content)

    def close(self) -> None:
        try:
            self._disk.operate()
        finally:
            self._file.close()


def use_unreliable_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> UnreliableDisk:
    """Have storage use such a disk, in this folder."""
    folder.mkdir(parents=True, exist_ok=True)
    fsspec.register_implementation(UnreliableDisk.protocol, UnreliableDisk, clobber=True)
    monkeypatch.setenv("FORGEARR_STORAGE__URL", f"{UnreliableDisk.protocol}://{folder}")
    get_settings.cache_clear()
    storage._filesystem_and_root.cache_clear()  # pyright: ignore[reportPrivateUsage]
    disk, _ = storage._filesystem_and_root()  # pyright: ignore[reportPrivateUsage]
    assert isinstance(disk, UnreliableDisk)
    return disk
