"""Find and remove folders of failed downloads that their service no longer knows, if they are on this machine.

SABnzbd prefixes the folder of a failed download with `_FAILED_`. It no longer knows the folder when the download is
deleted from its history.
"""

import posixpath
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath

from cluster.services.capabilities.download_tracking import FinishedFolders

FAILED_PREFIX = "_FAILED_"


@dataclass(frozen=True)
class LeftoverFolder:
    service_path: str  # the path on the service's machine
    path: Path
    changed_at: datetime
    is_removable: bool  # whether it certainly belongs to the service


def find(finished: FinishedFolders, folders: Mapping[str, str]) -> list[LeftoverFolder]:
    """The leftover folders of a service; empty if its folder is not on this machine."""
    # Without a mapping, a folder with the same path may belong to another program: nothing is removed from it.
    root, is_removable = _map_path(finished.folder, folders)
    if not root.is_dir():
        return []
    known_paths = {_normalize(path) for path in finished.known_folders}
    search_folders = [(finished.folder, root), *_subfolders(finished, root)]
    found: dict[Path, LeftoverFolder] = {}
    for service_folder, parent in search_folders:
        for folder in _failed_folders(parent):
            service_path = f"{service_folder.rstrip('/')}/{folder.name}"
            if not any(
                _normalize(service_path) == path or path.startswith(f"{_normalize(service_path)}/")
                for path in known_paths
            ):
                found[folder] = LeftoverFolder(service_path, folder, _changed_at(folder), is_removable)
    return sorted(found.values(), key=lambda leftover: leftover.service_path)


def remove(leftover: LeftoverFolder) -> None:
    shutil.rmtree(leftover.path)


def _map_path(service_path: str, folders: Mapping[str, str]) -> tuple[Path, bool]:
    """The local path of a service's folder, and whether the settings map it.

    The service may answer anything: what `..` or a link leads out of the mapped folder is not mapped.
    """
    path = PurePosixPath(_normalize(service_path))
    for prefix, local_root in sorted(folders.items(), key=lambda pair: len(pair[0]), reverse=True):
        if path.is_relative_to(prefix):
            root = Path(local_root).expanduser().resolve()
            folder = (root / path.relative_to(prefix)).resolve()
            return folder, folder.is_relative_to(root)
    return Path(path), False


def _subfolders(finished: FinishedFolders, root: Path) -> list[tuple[str, Path]]:
    """The folders of categories that are inside the service's folder."""
    candidates = [(f"{finished.folder.rstrip('/')}/{name}", root / name) for name in finished.subfolders]
    top = root.resolve()
    return [
        (service_path, path)
        for service_path, path in candidates
        if path.is_dir() and path.resolve().is_relative_to(top)
    ]


def _failed_folders(parent: Path) -> list[Path]:
    return [
        path
        for path in parent.iterdir()
        if path.name.startswith(FAILED_PREFIX) and path.is_dir() and not path.is_symlink()
    ]


def _changed_at(folder: Path) -> datetime:
    return datetime.fromtimestamp(folder.stat().st_mtime, UTC)


def _normalize(path: str) -> str:
    return posixpath.normpath(path)
