"""File storage, in a folder that all nodes share or in a bucket of S3, with the same functions for both.

What a function has stored outlasts a power cut. A bucket shows a file as a whole or not at all.

Many processes delete files, and a backup has them wait for a moment: until it has its snapshot. A lock of the kernel on
a file in storage does it. It ends with the process that holds it, so nothing is left of a backup that was killed, and
no clock matters.
"""

import fcntl
import logging
import os
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import IO, Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cluster import durable
from cluster.errors import SettingsError, Unavailable
from cluster.settings import get_settings

CHUNK_BYTES = 1024 * 1024
BUCKET_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # what others store and delete must be seen at once
    "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard"}},
    "skip_instance_cache": True,
}
DELETIONS_LOCK = ".deletions.lock"
MAX_HOLD_SECONDS = 60
"""How long deletions may be held. PostgreSQL ends an idle transaction, and so the snapshot, after this time too."""
MAX_WAIT_SECONDS = 2 * MAX_HOLD_SECONDS
POLL_SECONDS = 0.02

log = logging.getLogger(__name__)


class StorageUnavailable(Unavailable):
    """The bucket of storage.url cannot be reached; try again in a moment."""

    code = "STORAGE_UNAVAILABLE"


class DeletionsUnfinished(Unavailable):
    """Other processes delete files without a pause; try again in a moment."""

    code = "DELETIONS_UNFINISHED"


class HeldTooLong(Unavailable):
    """Deletions were held too long."""

    code = "HELD_TOO_LONG"
    retryable = True


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


def check() -> None:
    """Raise SettingsError or StorageUnavailable if storage.url cannot be used. A folder is made on first use."""
    filesystem, root = _filesystem_and_root()
    if isinstance(filesystem, Disk):
        return
    bucket, _, prefix = root.partition("/")
    try:
        filesystem.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, MaxKeys=1)
    except OSError as error:
        raise StorageUnavailable(f"The bucket '{bucket}' of storage.url cannot be read: {error}.") from error


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
        # A bucket shows a file only when it is committed. In a folder, it has a temporary name until then.
        self._is_local = isinstance(self._filesystem, Disk)
        if self._is_local:
            self._filesystem.makedirs(self._folder, exist_ok=True)
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
        try:
            self._file.close()  # it would do so by itself later, and fail
        finally:
            if self._is_local:
                Path(self._temporary_path).unlink(missing_ok=True)
            else:
                self._file.discard()


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
    files = filesystem.find(address)
    if not files:
        raise FileNotFoundError(f"{address} is not in storage")
    target = folder / address.rpartition("/")[2]
    filesystem.get(files, [f"{target}{file.removeprefix(address)}" for file in files])
    return target


def remove(address: str) -> None:
    """Delete a file or a folder. A missing one is no error."""
    filesystem, _ = _filesystem_and_root()
    with deletion(), suppress(FileNotFoundError):
        filesystem.rm(address, recursive=True)


@contextmanager
def deletion() -> Generator[None]:
    """A block that deletes files that rows name. It begins when nobody holds deletions."""
    root = local_root()
    if root is None or not root.is_dir():
        yield
        return
    with _lock_file(root) as lock:
        # A frozen process must not stop all trainings. It discards its snapshot when it goes on.
        if not _acquire(lock, fcntl.LOCK_SH, MAX_WAIT_SECONDS):
            log.warning("a backup holds deletions for more than %s s, so they go on", MAX_WAIT_SECONDS)
        yield


@contextmanager
def deletions_held(root: Path, max_seconds: float | None = MAX_HOLD_SECONDS) -> Generator[None]:
    """A block during which nothing is deleted from storage. It raises HeldTooLong if it took longer than that."""
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _lock_file(root) as lock:
        if not _acquire(lock, fcntl.LOCK_EX, MAX_WAIT_SECONDS):
            raise DeletionsUnfinished
        started = time.monotonic()
        yield
        seconds = time.monotonic() - started
    if max_seconds is not None and seconds > max_seconds:
        raise HeldTooLong(
            f"The snapshot of the files in {root} took {seconds:.0f} s, and deletions can be held for "
            f"{max_seconds:g} s only. Try again when the machine has less to do, or stop Forgearr first."
        )


def local_root() -> Path | None:
    """The folder of storage. None: it is a bucket."""
    filesystem, root = _filesystem_and_root()
    return Path(root) if isinstance(filesystem, Disk) else None


def _lock_file(root: Path) -> IO[str]:
    return os.fdopen(os.open(root / DELETIONS_LOCK, os.O_RDWR | os.O_CREAT, 0o600), "r+")


def _acquire(lock: IO[str], operation: int, seconds: float) -> bool:
    """Take the lock, and return whether that succeeded in time. Closing the file releases it."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(lock, operation | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        else:
            return True


@cache
def _filesystem_and_root() -> tuple[Any, str]:
    url = get_settings().storage_url
    if url.startswith("s3://"):
        return _bucket_filesystem(), url.removeprefix("s3://").rstrip("/")
    try:
        filesystem, root = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SettingsError(f"storage.url must be a folder, or s3://bucket/prefix, not {url}.") from error
    return Disk() if type(filesystem) is LocalFileSystem else filesystem, root.rstrip("/")


def _bucket_filesystem() -> Any:
    """Return the file system of S3. Its credentials and its endpoint are those of the environment and of ~/.aws."""
    try:
        from botocore.exceptions import BotoCoreError
        from fsspec.asyn import sync_wrapper
        from s3fs import S3FileSystem
    except ImportError as error:
        raise SettingsError(
            f"storage.url is {get_settings().storage_url}, and s3fs is not installed here. Every node needs it: "
            "`pip install '.[s3]' -c constraints.txt`."
        ) from error

    class Bucket(S3FileSystem):  # pyright: ignore[reportUntypedBaseClass]
        async def _call_s3(self, method: str, *arguments: Any, **options: Any) -> Any:
            try:
                return await super()._call_s3(method, *arguments, **options)
            except BotoCoreError as error:  # no answer, no credentials
                raise StorageUnavailable(f"The bucket of storage.url cannot be reached: {error}.") from error

        call_s3 = sync_wrapper(_call_s3)

    return Bucket(**BUCKET_OPTIONS)
