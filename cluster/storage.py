"""Files of jobs: a folder that every node shares, or a bucket, by the same few calls."""

from functools import cache
from pathlib import Path
from typing import Any

import fsspec

from cluster.settings import get_settings


def save(source: Path, name: str) -> str:
    """Copy a file into storage under `name` (jobs/ID/report.md); returns its address."""
    filesystem, root = _root()
    target = f"{root}/{name}"
    filesystem.makedirs(target.rpartition("/")[0], exist_ok=True)
    filesystem.put_file(str(source), target)
    return target


def read(address: str) -> bytes:
    filesystem, _ = _root()
    return filesystem.cat_file(address)


@cache
def _root() -> tuple[Any, str]:
    filesystem, root = fsspec.core.url_to_fs(get_settings().storage_url)
    return filesystem, root.rstrip("/")
