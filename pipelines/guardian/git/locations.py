"""Check that the folder of a repository is in guardian.roots, and name the folders of mirrors."""

from pathlib import Path

from cluster.errors import Forbidden, InvalidRequest
from cluster.settings import get_settings, home


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
