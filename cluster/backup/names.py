"""The names of the backups of one installation, and which of them are deleted."""

import hashlib
from datetime import datetime
from pathlib import Path

from cluster import secrets

SUFFIX = ".tar"


def new_name(created_at: datetime) -> str:
    return f"{_prefix()}{created_at:%Y%m%dT%H%M%SZ}{SUFFIX}"


def draft_name(name: str) -> str:
    """The name of a backup until it is finished."""
    return f".{name}.part"


def remove_unfinished(folder: Path) -> None:
    """Delete what backups that were killed have written. None is being made now."""
    for path in folder.glob(draft_name(f"{_prefix()}*{SUFFIX}")):
        path.unlink(missing_ok=True)


def remove_old(folder: Path, keep: int) -> list[Path]:
    """Delete all but the newest backups of this installation, and return them. Other files stay."""
    old = sorted(folder.glob(f"{_prefix()}[0-9]*T[0-9]*Z{SUFFIX}"), reverse=True)[keep:]
    for path in old:
        path.unlink(missing_ok=True)
    return old


def _prefix() -> str:
    """Several installations may have one folder. The signing key tells them apart, also after they were moved."""
    return f"forgearr-{hashlib.sha256(f'backup {secrets.signing_key()}'.encode()).hexdigest()[:8]}-"
