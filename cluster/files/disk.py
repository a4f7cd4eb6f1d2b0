"""Free space on this machine's disks. Whoever is about to take bytes asks first: a full disk stops the database too."""

import errno
import shutil
from pathlib import Path

from sqlalchemy.exc import DBAPIError

from cluster.errors import ForgearrError
from cluster.settings import get_settings

MB = 1024 * 1024
FULL_DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class DiskFull(ForgearrError):
    """The disk is full: free some space on it, or ask whoever runs this server to."""

    status = 507
    error = "insufficient_storage"
    code = "DISK_FULL"


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Refuse to take this many bytes if less than `storage.min_free_mb` would stay free."""
    free, reserve = shutil.disk_usage(folder).free, get_settings().storage.min_free_mb * MB
    if free < needed_bytes + reserve:
        raise DiskFull(
            f"{purpose} needs {gigabytes(needed_bytes)} in {folder}, where {gigabytes(free)} are free, and "
            f"{gigabytes(reserve)} have to stay free (storage.min_free_mb). Free some space there, or set "
            "FORGEARR_HOME to a folder on a larger disk.",
            details={"needed_bytes": needed_bytes, "free_bytes": free, "reserved_bytes": reserve},
        )


def has_filled(error: Exception) -> bool:
    """Whether this error says that a disk is full: that of files, or that of the database."""
    if isinstance(error, DBAPIError):
        original = error.orig
        return (
            getattr(original, "sqlite_errorname", None) == "SQLITE_FULL" or getattr(original, "sqlstate", "") == "53100"
        )
    return isinstance(error, OSError) and error.errno in FULL_DISK_ERRORS


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB"
