"""The cache of model files on this machine: FORGEARR_HOME/cache/models/SHA256.gguf, with LRU eviction.

A file's name is its hash, and a file appears only when it is complete. Several processes may use the same folder.
"""

import asyncio
import fcntl
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from uuid import uuid4

from cluster import durable
from cluster.errors import ForgearrError
from cluster.settings import get_settings, home

log = logging.getLogger(__name__)

MIN_UNUSED_SECONDS = 3600
"""A file that was used this recently may still be in use, and is not evicted."""


class DamagedModel(ForgearrError):
    """A downloaded model file differs from the registered one."""

    code = "MODEL_FILE_DAMAGED"
    retryable = True


def cache_file(path: Path, sha256: str) -> Path:
    """Add a file of this machine to the cache, and return the copy. The caller has just computed the hash."""
    target = _cache_path(sha256)
    partial = _partial_path(target)
    try:
        try:
            os.link(path, partial)  # free if both are on one disk
        except OSError:
            shutil.copyfile(path, partial)
        os.utime(partial)
        durable.publish(partial, target)
    finally:
        partial.unlink(missing_ok=True)
    evict(target)
    return target


def find(sha256: str, size: int) -> Path | None:
    """The cached copy of a file, if there is a complete one. It counts as used now."""
    target = _cache_path(sha256)
    try:
        if target.stat().st_size != size:
            log.warning("%s has %d bytes instead of %d: it is fetched again", target, target.stat().st_size, size)
            return None
        os.utime(target)
    except FileNotFoundError:
        return None
    return target


async def get_or_download(sha256: str, size: int, download: Callable[[Path], Awaitable[str]]) -> Path:
    """The cached copy of a file. If there is none, `download` writes it to a path, and returns its SHA-256."""
    if (target := find(sha256, size)) is not None:
        return target
    target = _cache_path(sha256)
    async with _download_lock(target):
        if (cached := find(sha256, size)) is not None:  # another process has fetched it meanwhile
            return cached
        partial = _partial_path(target)
        try:
            actual_sha256 = await download(partial)
            if actual_sha256 != sha256:
                raise DamagedModel(f"A downloaded model file has the SHA-256 {actual_sha256} instead of {sha256}.")
            await asyncio.to_thread(durable.publish, partial, target)
        finally:
            partial.unlink(missing_ok=True)
    await asyncio.to_thread(evict, target)
    return target


def evict(protected: Path) -> None:
    """Delete the least recently used files until the rest fits into `engines.cache_gb`."""
    files = sorted(_files())
    excess = sum(size for _, size, _ in files) - get_settings().engines.cache_gb * 1_000_000_000
    for used_at, size, file in files:
        if time.time() - used_at < MIN_UNUSED_SECONDS:
            return
        # Old lock files and unfinished downloads are always deleted.
        if file.suffix == ".gguf" and (excess <= 0 or file == protected):
            continue
        file.unlink(missing_ok=True)
        excess -= size


def _files() -> Iterator[tuple[float, int, Path]]:
    """The time of the last use, the size and the path of each file."""
    for file in _folder().iterdir():
        with suppress(FileNotFoundError):  # another process evicts files too
            status = file.stat()
            yield status.st_mtime, status.st_size, file


@asynccontextmanager
async def _download_lock(target: Path) -> AsyncGenerator[None]:
    """Let one process at a time download a file. The system releases the lock of a process that dies."""
    with target.with_suffix(".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                await asyncio.sleep(0.2)
        yield


def _cache_path(sha256: str) -> Path:
    return _folder() / f"{sha256}.gguf"


def _partial_path(target: Path) -> Path:
    return target.with_suffix(f".{uuid4().hex}.part")


def _folder() -> Path:
    folder = home() / "cache" / "models"
    folder.mkdir(parents=True, exist_ok=True)
    return folder
