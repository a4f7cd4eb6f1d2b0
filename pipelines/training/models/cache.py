"""Copies of model files on this machine: FORGEARR_HOME/cache/models/SHA256.gguf, the least recently used go first.

A file's name is its hash, so a copy is right or it is not there. Several processes may use the same folder.
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

from cluster.errors import ForgearrError
from cluster.settings import get_settings, home

log = logging.getLogger(__name__)

MIN_UNUSED_SECONDS = 3600
"""What was used this recently may be in use, and stays."""


class DamagedModel(ForgearrError):
    """A model's file did not arrive as it was registered."""

    code = "MODEL_FILE_DAMAGED"
    retryable = True


def cache_file(path: Path, sha256: str) -> Path:
    """Put a file of this machine into the cache; returns its copy there. The caller has just computed its hash."""
    target = _cache_path(sha256)
    partial = _partial_path(target)
    try:
        try:
            os.link(path, partial)  # costs nothing where both are on one disk
        except OSError:
            shutil.copyfile(path, partial)
        os.utime(partial)
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)
    evict(target)
    return target


def find(sha256: str, size: int) -> Path | None:
    """The copy of a file, if there is a whole one; it counts as used now."""
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
    """The copy of a file, which `download` makes when there is none; it returns the hash of what has come."""
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
                raise DamagedModel(f"A model file arrived with the SHA-256 {actual_sha256} instead of {sha256}.")
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    await asyncio.to_thread(evict, target)
    return target


def evict(protected: Path) -> None:
    """Delete the copies that were used longest ago until the rest fit into `engines.cache_gb`."""
    files = sorted(_files())
    excess = sum(size for _, size, _ in files) - get_settings().engines.cache_gb * 1_000_000_000
    for used_at, size, file in files:
        if time.time() - used_at < MIN_UNUSED_SECONDS:
            return
        # A download that was never finished, or a lock, is of no use to anybody by now.
        if file.suffix == ".gguf" and (excess <= 0 or file == protected):
            continue
        file.unlink(missing_ok=True)
        excess -= size


def _files() -> Iterator[tuple[float, int, Path]]:
    """(time of the last use, bytes, file) of everything there is."""
    for file in _folder().iterdir():
        with suppress(FileNotFoundError):  # another process makes room too
            status = file.stat()
            yield status.st_mtime, status.st_size, file


@asynccontextmanager
async def _download_lock(target: Path) -> AsyncGenerator[None]:
    """One process at a time fetches a file. The system takes the lock back from one that dies."""
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
