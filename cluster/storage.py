"""Files of jobs: a folder that every node shares, or a bucket, by the same few calls."""

from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any

import fsspec

from cluster.settings import get_settings


def save(source: Path, name: str) -> str:
    """Copy a file, or a folder with all that is in it, into storage under `name` (jobs/ID/report.md).

    Returns its address. What was there under that name before is replaced.
    """
    filesystem, root = _root()
    target = f"{root}/{name}"
    if source.is_dir():
        remove(target)
        for file in sorted(path for path in source.rglob("*") if path.is_file()):
            save(file, f"{name}/{file.relative_to(source).as_posix()}")
        return target
    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    if "file" not in filesystem.protocol:
        filesystem.put_file(str(source), target)
        return target
    # A bucket shows a file when it is whole; in a folder, nobody must see half of one either.
    part = f"{target}.{token_hex(4)}.part"
    try:
        filesystem.put_file(str(source), part)
        Path(part).replace(target)
    finally:
        Path(part).unlink(missing_ok=True)
    return target


def address(name: str) -> str:
    """Where something of this name lies, or would."""
    _, root = _root()
    return f"{root}/{name}"


def exists(address: str) -> bool:
    filesystem, _ = _root()
    return filesystem.exists(address)


def read(address: str) -> bytes:
    filesystem, _ = _root()
    return filesystem.cat_file(address)


def fetch(address: str, folder: Path) -> Path:
    """A file or folder of storage as one of this machine: itself when it is here, else a copy in `folder`.

    Whoever gets it may read it, but must not write into it.
    """
    filesystem, _ = _root()
    if "file" in filesystem.protocol:
        if not Path(address).exists():
            raise FileNotFoundError(f"{address} is not in storage")
        return Path(address)
    target = folder / address.rpartition("/")[2]
    filesystem.get(address, str(target), recursive=True)
    return target


def remove(address: str) -> None:
    """Delete a file or a folder; one that is not there is no error."""
    filesystem, _ = _root()
    if filesystem.exists(address):
        filesystem.rm(address, recursive=True)


@cache
def _root() -> tuple[Any, str]:
    filesystem, root = fsspec.core.url_to_fs(get_settings().storage_url)
    return filesystem, root.rstrip("/")
