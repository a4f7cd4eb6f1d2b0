"""The objects that are read from a repository: commits, files and changes."""

from dataclasses import dataclass
from datetime import UTC, datetime

COMMIT_FORMAT = "%H%x00%ct%x00%P%x00%s%x00%b%x00"


@dataclass(frozen=True)
class TreeFile:
    """A regular file of a commit: not a link, not a submodule."""

    path: str
    blob: str
    bytes: int


@dataclass(frozen=True)
class Commit:
    sha: str
    committed_at: datetime
    subject: str
    body: str
    parents: tuple[str, ...]  # also empty where a shallow history ends


@dataclass(frozen=True)
class Changes:
    """The difference between two commits."""

    commits: int | None  # None: unknown, because the history is shallow
    files: int
    lines: int  # added and removed, of text
    paths: tuple[str, ...]  # of changed files, repo.MAX_PATHS at most
    rewritten: bool  # the older commit is not an ancestor of the newer one


def new_commit(sha: str, seconds: str, parents: str, subject: str, body: str) -> Commit:
    return Commit(sha, datetime.fromtimestamp(int(seconds), UTC), subject, body.strip(), tuple(parents.split()))
