"""Who this dispatcher is, as the holder of the leadership, and which process was the dispatcher before it."""

import os
import secrets
import socket
from pathlib import Path

from cluster.settings import home


def new_holder() -> str:
    """Return a name that no other process has: host names and folders are the same in many containers."""
    return f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(8)}"


def find_predecessor() -> str | None:
    """Return the dispatcher that led last in this FORGEARR_HOME: it is dead, because an installation has only one."""
    try:
        return _path().read_text()
    except FileNotFoundError:
        return None


def remember(holder: str) -> None:
    """Record which dispatcher leads, so that its successor need not wait until its leadership expires."""
    path = _path()
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    temporary.write_text(holder)
    temporary.replace(path)


def _path() -> Path:
    return home() / "run" / "dispatcher"
