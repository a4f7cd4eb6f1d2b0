"""Free space on this machine's disks. Whoever is about to take bytes asks first: a full disk stops the database too."""

import shutil
from pathlib import Path

from cluster.errors import ForgearrError
from cluster.settings import get_settings

MB = 1024 * 1024


class DiskFull(ForgearrError):
    """There is not enough space on the disk."""

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


def gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB"
