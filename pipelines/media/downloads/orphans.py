"""Folders of failed downloads that their service no longer knows: found where its folders can be seen from here.

SABnzbd puts `_FAILED_` before the name of a folder whose download has failed, and forgets the folder with its history.
"""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from cluster.services.capabilities.download_tracking import Finished

MARK = "_FAILED_"


@dataclass(frozen=True)
class Leftover:
    told_path: str  # as the service would call it
    path: Path
    changed_at: datetime
    may_go: bool  # whether this is surely the service's own folder


def find(finished: Finished, folders: Mapping[str, str]) -> list[Leftover]:
    """The leftover folders of a service. None are found where its folder is not on this machine."""
    # What merely has the same path here may be another program's: nothing is removed from there.
    root, may_go = _local(finished.folder, folders)
    if not root.is_dir():
        return []
    known = {_plain(path) for path in finished.known}
    places = [(finished.folder, root), *_subfolders(finished, root)]
    found: dict[Path, Leftover] = {}
    for told, place in places:
        for folder in _marked(place):
            told_path = f"{told.rstrip('/')}/{folder.name}"
            if not any(_plain(told_path) == path or path.startswith(f"{_plain(told_path)}/") for path in known):
                found[folder] = Leftover(told_path, folder, _changed_at(folder), may_go)
    return sorted(found.values(), key=lambda leftover: leftover.told_path)


def remove(leftover: Leftover) -> None:
    shutil.rmtree(leftover.path)


def _local(told: str, folders: Mapping[str, str]) -> tuple[Path, bool]:
    """Where a service's folder lies here, and whether somebody has said so."""
    path = PurePosixPath(told)
    for prefix, here in sorted(folders.items(), key=lambda pair: len(pair[0]), reverse=True):
        if path.is_relative_to(prefix):
            return Path(here).expanduser() / path.relative_to(prefix), True
    return Path(told), False


def _subfolders(finished: Finished, root: Path) -> list[tuple[str, Path]]:
    """Folders of categories, inside of the service's own."""
    inside = [(f"{finished.folder.rstrip('/')}/{name}", root / name) for name in finished.subfolders]
    top = root.resolve()
    return [(told, path) for told, path in inside if path.is_dir() and path.resolve().is_relative_to(top)]


def _marked(place: Path) -> list[Path]:
    return [path for path in place.iterdir() if path.name.startswith(MARK) and path.is_dir() and not path.is_symlink()]


def _changed_at(folder: Path) -> datetime:
    return datetime.fromtimestamp(folder.stat().st_mtime, UTC)


def _plain(path: str) -> str:
    return str(PurePosixPath(path))
