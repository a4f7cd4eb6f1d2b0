"""What is read from a repository: commits, files, changes."""

from dataclasses import dataclass
from datetime import UTC, datetime

COMMIT_FORMAT = "%H%x00%ct%x00%P%x00%s%x00%b%x00"


@dataclass(frozen=True)
class TreeFile:
    """A regular file of a commit. Links and submodules are none."""

    path: str
    blob: str
    bytes: int


@dataclass(frozen=True)
class Commit:
    sha: str
    committed_at: datetime
    subject: str
    body: str
    parents: tuple[str, ...]  # none also where a shallow history ends


@dataclass(frozen=True)
class Changes:
    """What is different between two commits."""

    commits: int | None  # None: the history that is there does not say
    files: int
    lines: int  # added and removed, of text
    paths: tuple[str, ...]  # of files, PATHS_MAX at most
    rewritten: bool  # the newer commit does not stand on the older one


def new_commit(sha: str, seconds: str, parents: str, subject: str, body: str) -> Commit:
    return Commit(sha, datetime.fromtimestamp(int(seconds), UTC), subject, body.strip(), tuple(parents.split()))
