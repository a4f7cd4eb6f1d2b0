"""Check that other accounts of this machine cannot read the installation."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import SettingsError
from cluster.settings import home

OTHERS = stat.S_IRWXG | stat.S_IRWXO


class NotPrivate(SettingsError):
    """Other accounts can read the installation."""

    code = "NOT_PRIVATE"


def require_private_home() -> None:
    """Raise NotPrivate if others can read the home or one of its keys, and keep new files from them."""
    if exposed := list(readable_by_others()):
        commands = " && ".join(f"chmod {mode} {path}" for path, mode in exposed)
        raise NotPrivate(f"Other accounts of this machine can read {exposed[0][0]}: run `{commands}`.")
    if home().stat().st_uid != os.getuid():
        raise NotPrivate(f"{home()} belongs to another account: run `chown -R {os.getuid()} {home()}` as root.")
    os.umask(OTHERS)


def readable_by_others() -> Iterator[tuple[Path, str]]:
    """Yield the home, its folder of keys and the keys that others can read, each with the mode that it should have."""
    keys = home() / "keys"
    for path in (home(), keys, *sorted(keys.glob("*"))):
        if path.exists() and path.stat().st_mode & OTHERS:
            yield path, "700" if path.is_dir() else "600"
