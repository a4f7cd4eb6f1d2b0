"""Check that the folder of a repository is in guardian.roots, and name the folders of mirrors."""

import os
from collections.abc import Iterator
from pathlib import Path

from cluster.errors import Forbidden, InvalidRequest
from cluster.settings import get_settings, home
from pipelines.guardian.git.errors import RepositoryUnreadable


class FolderOutside(Forbidden):
    """Repositories must be in the folders of guardian.roots."""

    code = "FOLDER_OUTSIDE"


class InvalidPath(InvalidRequest):
    """The path of a repository is not valid."""

    code = "INVALID_REPOSITORY_PATH"


def mirror_path(repository_id: str) -> Path:
    """The folder on this machine with the mirror of a remote repository."""
    return home() / "cache" / "repositories" / f"{repository_id}.git"


def is_inside(folder: Path) -> bool:
    """Whether a folder, with its links already resolved, is in one of guardian.roots."""
    return any(folder.is_relative_to(root) for root in _roots())


def checked_folder(path: str) -> Path:
    """Resolve a path to a folder in guardian.roots. A relative path may be in any of them."""
    if "\0" in path or not path:
        raise InvalidPath("A path must not be empty, and must not contain the character U+0000.")
    if ".." in Path(path).parts:
        raise InvalidPath(f"A path must not contain '..': {path}")
    try:
        named = Path(path).expanduser()
    except RuntimeError:
        raise InvalidPath(f"There is no such home folder: {path}") from None
    if named.is_absolute():
        return _resolve_inside_roots(named)
    candidates = [_resolve_inside_roots(root / named) for root in _roots()]
    return next((folder for folder in candidates if _exists(folder)), candidates[0])


def object_folders(objects: Path) -> Iterator[Path]:
    """Yield every place from which git reads objects: this folder, those that its alternates name, links in them."""
    remaining, seen = [objects], set[Path]()
    while remaining:
        folder = remaining.pop()
        yield folder
        if (resolved := folder.resolve()) in seen or not resolved.is_dir():
            continue
        seen.add(resolved)
        remaining += [*_links(resolved), *_alternates(resolved)]


def _alternates(objects: Path) -> Iterator[Path]:
    path = objects / "info" / "alternates"
    lines = path.read_text(errors="surrogateescape").split("\n") if path.exists() else []
    for line in lines:
        if line.startswith('"'):
            yield Path("/")  # git decodes a quoted line; here it counts as a folder outside
        elif line and not line.startswith("#"):
            yield objects / line


def _links(folder: Path) -> Iterator[Path]:
    try:
        entries = list(os.scandir(folder))
    except PermissionError:
        raise RepositoryUnreadable(f"The account that Forgearr runs as may not read {folder}.") from None
    for entry in entries:
        if entry.is_symlink():
            yield Path(entry.path)
        elif entry.is_dir():
            yield from _links(Path(entry.path))


def _resolve_inside_roots(named: Path) -> Path:
    try:
        folder = named.resolve()
    except (OSError, RuntimeError) as error:
        raise InvalidPath(f"{named} cannot be resolved: {error}") from None
    # The same error whether or not the folder exists: callers must not learn what is outside.
    if not is_inside(folder):
        raise FolderOutside(f"{named} is outside of the folders for repositories (guardian.roots).")
    return folder


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError:
        return True  # opening the repository will raise the reason


def _roots() -> list[Path]:
    return [root.expanduser().resolve() for root in get_settings().guardian.roots]
