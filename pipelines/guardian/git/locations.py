"""Where repositories may be, and where their mirrors are."""

from pathlib import Path

from cluster.errors import Forbidden, InvalidRequest
from cluster.settings import get_settings, home


class FolderOutside(Forbidden):
    """Repositories lie in the folders of guardian.roots only."""

    code = "FOLDER_OUTSIDE"


class InvalidPath(InvalidRequest):
    """The path of a repository is not valid."""

    code = "INVALID_REPOSITORY_PATH"


def mirror_path(repository_id: str) -> Path:
    """Where the objects of a repository with an address are kept on this machine."""
    return home() / "cache" / "repositories" / f"{repository_id}.git"


def is_inside(folder: Path) -> bool:
    """Whether a folder, all links resolved, lies in one of guardian.roots."""
    return any(folder.is_relative_to(root) for root in _roots())


def checked_folder(path: str) -> Path:
    if "\0" in path or not path:
        raise InvalidPath("A path has some letters, and not the character U+0000.")
    if ".." in Path(path).parts:
        raise InvalidPath(f"A path may not go up by '..': {path}")
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
        raise InvalidPath(f"{named} cannot be followed: {error}") from None
    # Whether there is anything outside is nobody's business.
    if not is_inside(folder):
        raise FolderOutside(f"{named} lies outside of the folders for repositories (guardian.roots).")
    return folder


def _exists(folder: Path) -> bool:
    try:
        return folder.exists()
    except OSError:
        return True  # opening it will tell why it cannot be seen


def _roots() -> list[Path]:
    return [root.expanduser().resolve() for root in get_settings().guardian.roots]
