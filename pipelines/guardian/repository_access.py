"""Open a registered repository for reading. A remote one is fetched first."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.guardian.git import mirrors
from pipelines.guardian.git.locations import mirror_path
from pipelines.guardian.git.mirrors import TIP_REF, OnProgress
from pipelines.guardian.git.repo import RepoReader, closing_reader, open_inside_roots
from pipelines.guardian.repositories import Repository, to_remote


@contextmanager
def open_registered(
    repository: Repository, on_progress: OnProgress = lambda _: None, commits: Sequence[str] = ()
) -> Generator["RepoReader"]:
    """Open a registered repository in its current state.

    The mirror of a remote repository gets the tip, the commit of the last training, and `commits`, if they still exist.
    """
    if repository.path is not None:
        with open_inside_roots(Path(repository.path), repository.branch) as reader:
            yield reader
        return
    required_commits = {*commits, repository.trained_commit} - {None}
    mirror = mirror_path(repository.id)
    mirrors.fetch(mirror, to_remote(repository), sorted(map(str, required_commits)), on_progress)
    with closing_reader(RepoReader(mirror, TIP_REF)) as reader:
        yield reader
