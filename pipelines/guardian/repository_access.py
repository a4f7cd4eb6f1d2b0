"""Open the repository of a row."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pipelines.guardian.git import mirrors
from pipelines.guardian.git.locations import mirror_of
from pipelines.guardian.git.mirrors import TIP, OnProgress
from pipelines.guardian.git.repo import Checkout, closing_checkout, opened_inside
from pipelines.guardian.repositories import Repository, remote_of


@contextmanager
def opened(
    repository: Repository, on_progress: OnProgress = lambda _: None, commits: Sequence[str] = ()
) -> Generator["Checkout"]:
    """A registered repository as it is now: one with an address is fetched first.

    `commits` are needed beside the tip, if they still exist; the one last trained from always is.
    """
    if repository.path is not None:
        with opened_inside(Path(repository.path), repository.branch) as checkout:
            yield checkout
        return
    kept = {*commits, repository.trained_commit} - {None}
    mirror = mirror_of(repository.id)
    mirrors.fetch(mirror, remote_of(repository), sorted(map(str, kept)), on_progress)
    with closing_checkout(Checkout(mirror, TIP)) as checkout:
        yield checkout
