"""The file of a backup: a tar file with a header, the content, and a hash of all that comes before it.

    forgearr-backup.json    the header
    identity.age            the key of the content, encrypted with the passphrase; only if it is encrypted
    content.tar(.age)       the files, and then their manifest
    sha256                  the hash of every byte before

Tools read it too: `tar xf BACKUP`, then `age -d -i identity.age content.tar.age | tar x`.
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from cluster.backup.errors import BackupDamaged, BackupNewer, NoBackup
from cluster.backup.manifest import FORMAT, Header

HEADER, IDENTITY, DIGEST = "forgearr-backup.json", "identity.age", "sha256"
PLAIN, ENCRYPTED = "content.tar", "content.tar.age"
BLOCK = tarfile.BLOCKSIZE
TAIL_BYTES = 4 * BLOCK
"""The member with the hash, and the two empty blocks that end a tar file."""


class ArchiveWriter:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def add(self, name: str, content: bytes) -> None:
        self._file.write(_block(name, len(content)) + content + _padding(len(content)))

    @contextmanager
    def member(self, name: str) -> Generator[BinaryIO]:
        """A member whose size is known when it is written."""
        start = self._file.tell()
        self._file.write(_block(name, 0))
        yield self._file
        end = self._file.tell()
        size = end - start - BLOCK
        self._file.write(_padding(size))
        end = self._file.tell()
        self._file.seek(start)
        self._file.write(_block(name, size))
        self._file.seek(end)

    def finish(self) -> None:
        """Write the hash. What was written is read once more for it."""
        self._file.flush()
        size = self._file.tell()
        self._file.write(_tail(_digest(self._file, size)))


class Archive:
    """A backup that is whole. The file is read while this is used."""

    def __init__(self, header: Header, file: io.BufferedReader, members: dict[str, tuple[int, int]]) -> None:
        self.header = header
        self._file = file
        self._members = members

    def read(self, name: str) -> bytes:
        return self.open(name).read()

    def open(self, name: str) -> BinaryIO:
        if name not in self._members:
            raise BackupDamaged(f"The backup has no part '{name}'.")
        return io.BufferedReader(_Slice(self._file, *self._members[name]))


@contextmanager
def open_archive(path: Path) -> Generator[Archive]:
    """Open a backup. A file that is no backup, or a damaged or newer one, is refused as a whole."""
    if not path.is_file():
        raise NoBackup(f"There is no file {path}.")
    with path.open("rb") as file:
        name, size = _read_block(file) or ("", 0)
        if name != HEADER:
            raise NoBackup(f"{path} is not a backup of Forgearr, or it is damaged at its beginning.")
        text = file.read(size)
        _refuse_newer(path, text)
        _require_whole(path, file)
        header, members = _read_header(path, text), _find_members(path, file)
        yield Archive(header, file, members)


def _refuse_newer(path: Path, text: bytes) -> None:
    try:
        document = json.loads(text)
        version, number = document["version"], int(document["format"])
    except (ValueError, TypeError, KeyError):
        raise BackupDamaged(f"The backup {path} is damaged: its header cannot be read.") from None
    if number > FORMAT:
        raise BackupNewer(
            f"The backup {path} was made by Forgearr {version}, in a format that this version does not know: "
            "install that version, and restore it there."
        )


def _require_whole(path: Path, file: BinaryIO) -> None:
    size = path.stat().st_size - TAIL_BYTES
    expected = _tail(_digest(file, size)) if size > 0 else b""
    if file.read() != expected:
        raise BackupDamaged(
            f"The backup {path} is damaged: it was changed or cut off after it was made. Use another one."
        )


def _read_header(path: Path, text: bytes) -> Header:
    try:
        return Header.model_validate_json(text)
    except ValidationError as error:
        raise BackupDamaged(f"The backup {path} has a header that cannot be used: {error}") from None


def _find_members(path: Path, file: BinaryIO) -> dict[str, tuple[int, int]]:
    """The position and size of each member."""
    members: dict[str, tuple[int, int]] = {}
    file.seek(0)
    while block := _read_block(file):
        name, size = block
        members[name] = (file.tell(), size)
        file.seek(size + len(_padding(size)), io.SEEK_CUR)
    return members


def _block(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o600
    return info.tobuf(tarfile.GNU_FORMAT)


def _read_block(file: BinaryIO) -> tuple[str, int] | None:
    try:
        info = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "strict")
    except (tarfile.HeaderError, ValueError):
        return None
    return info.name, info.size


def _padding(size: int) -> bytes:
    return bytes(-size % BLOCK)


def _tail(digest: str) -> bytes:
    return _block(DIGEST, len(digest)) + digest.encode() + _padding(len(digest)) + bytes(2 * BLOCK)


def _digest(file: BinaryIO, size: int) -> str:
    """The SHA-256 of the first bytes of a file. The file is at their end afterwards."""
    sha256 = hashlib.sha256()
    file.seek(0)
    while size > 0 and (chunk := file.read(min(size, 1024 * 1024))):
        sha256.update(chunk)
        size -= len(chunk)
    return sha256.hexdigest()


class _Slice(io.RawIOBase):
    """A part of a file, as a file."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self._file, self._position, self._end = file, start, start + size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "bytearray | memoryview") -> int:  # pyright: ignore[reportIncompatibleMethodOverride]
        view = memoryview(buffer)[: self._end - self._position]
        self._file.seek(self._position)
        count = self._file.readinto(view)
        self._position += count
        return count
