"""Temporary folders for running jobs, on this machine's disk, and what a disk says that becomes full."""

import fcntl
import re
import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cluster.files.disk import DiskFull, gigabytes, has_filled
from cluster.settings import home

MIN_FREE_BYTES = 4_000_000
"""A disk with less free space counts as full: the next block of a model does not fit."""

SHORT_WRITE_PATTERN = r"No space left on device|Disk quota exceeded|File too large|\d+ requested and \d+ written"


@contextmanager
def temporary_folder(job_id: str) -> Generator[Path]:
    """Create a folder, which is deleted with its contents when the block ends.

    A killed process leaves its folder behind. The kernel releases its lock, so the next call deletes the folder.
    """
    parent = home() / "work"
    parent.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(parent)
    path = Path(tempfile.mkdtemp(prefix=f"{job_id}-", dir=parent))
    lock_file = path.with_suffix(".lock")
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            lock_file.unlink(missing_ok=True)


def is_disk_full(error: Exception, folder: Path) -> bool:
    """Whether a full disk caused this error. Some libraries only report that they wrote less than expected."""
    if has_filled(error):
        return True
    return bool(re.search(SHORT_WRITE_PATTERN, str(error))) or shutil.disk_usage(folder).free < MIN_FREE_BYTES


def disk_full_error(folder: Path, needed_bytes: int, purpose: str) -> DiskFull:
    return DiskFull(
        f"The disk became full: {purpose} needs {gigabytes(needed_bytes)} in {folder}, where other programs "
        "write too. Free some space there, and retry.",
        details={"folder": str(folder), "needed_bytes": needed_bytes},
    )


def _remove_abandoned(parent: Path) -> None:
    for lock_file in parent.glob("*.lock"):
        try:
            with lock_file.open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock_file.with_suffix(""), ignore_errors=True)
                lock_file.unlink(missing_ok=True)
        except (BlockingIOError, FileNotFoundError):
            continue  # in use, or removed by another process just now
