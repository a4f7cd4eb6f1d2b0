"""Read a git repository: its commits, their files, and the changes between two commits.

Only objects are read. There is no working tree, nothing is checked out or filtered, and no program that the repository
names is run. A reader belongs to one thread.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import git

from pipelines.guardian.git.env import first_error, git_environment
from pipelines.guardian.git.errors import CommitNotFound, NotARepository, RepositoryDamaged, RepositoryUnreadable
from pipelines.guardian.git.locations import FolderOutside, checked_folder, is_inside, object_folders
from pipelines.guardian.git.mirrors import BranchNotFound, EmptyRepository
from pipelines.guardian.git.objects import COMMIT_FORMAT, Changes, Commit, TreeFile, new_commit

EMPTY_TREE = "4b825dc642cb6eb9a060e54bf8d69288fbee4904"
MAX_PATHS = 100_000
CHUNK_BYTES = 65_536
REGULAR_FILE_MODE = b"100"


@contextmanager
def open_folder(path: Path, branch: str | None = None) -> Generator["RepoReader"]:
    """Open a repository in a folder, bare or with a working tree."""
    with closing_reader(RepoReader(path, f"refs/heads/{branch}" if branch else "HEAD")) as reader:
        yield reader


@contextmanager
def open_inside_roots(path: Path, branch: str | None = None) -> Generator["RepoReader"]:
    """Open a repository that is in guardian.roots, with its git directories."""
    with open_folder(path, branch) as reader:
        # One after the other: what is in a folder outside must not be looked at.
        for folder in chain((path, *reader.folders), object_folders(reader.folders[1] / "objects")):
            if not is_inside(folder.resolve()):
                raise FolderOutside(f"{path} refers to a folder outside of the folders for repositories.")
        yield reader


class RepoReader:
    def __init__(self, path: Path, reference: str) -> None:
        self._reference = reference
        self._path = path
        self._repository = _open(path)
        self.folders = (Path(self._repository.git_dir), Path(self._repository.common_dir))
        self._git: Any = self._repository.git
        self._git.update_environment(**git_environment())
        self._require_sha1()
        self._shallow_commits = self._read_shallow_commits()

    def tip(self) -> Commit:
        """The newest commit of the branch."""
        found = self._output("rev-parse", "--verify", "--quiet", f"{self._reference}^{{commit}}", may_fail=True)
        if found:
            return self.commit(found)
        if self._reference != "HEAD" and self._output("for-each-ref", "--count=1", "refs/heads"):
            raise BranchNotFound(f"{self._path} has no branch '{self._reference.removeprefix('refs/heads/')}'.")
        raise EmptyRepository(f"{self._path} has no commit yet.")

    def commit(self, sha: str) -> Commit:
        found = self._output("rev-parse", "--verify", "--quiet", "--end-of-options", f"{sha}^{{commit}}", may_fail=True)
        if not found:
            raise CommitNotFound(f"{self._path} has no commit {sha}.")
        return next(self.log(found, 1))

    def log(self, sha: str, limit: int) -> Iterator[Commit]:
        """This commit and its ancestors, newest first."""
        command = ["rev-list", "--no-commit-header", f"--format={COMMIT_FORMAT}", "--encoding=UTF-8"]
        fields: list[str] = []
        for field in self._records([*command, f"--max-count={limit}", sha, "--"]):
            fields.append(field.decode(errors="replace"))
            if len(fields) == 5:
                yield new_commit(*fields)
                fields = []

    def files(self, sha: str) -> Iterator[TreeFile]:
        """The regular files of a commit, in the order of their paths."""
        for record in self._records(["ls-tree", "-r", "-z", "-l", "--full-tree", sha]):
            columns, _, path = record.partition(b"\t")
            mode, _, blob, size = columns.split()
            if mode.startswith(REGULAR_FILE_MODE):
                yield TreeFile(path.decode(errors="replace"), blob.decode(), int(size))

    def read(self, blob: str) -> bytes:
        """The content of a file. Check its size first: all of it is loaded."""
        try:
            _, _, _, content = self._git.get_object_data(blob)
        except (ValueError, OSError) as error:
            raise RepositoryDamaged(f"{self._path} has no object {blob}: {error}") from error
        return content

    def diff(self, sha: str, max_bytes: int) -> str | None:
        """The patch of a commit against its first parent.

        None if it has more than `max_bytes`, is not UTF-8 text, or is unknown because a shallow history ends here.
        """
        if sha in self._shallow_commits:
            return None
        parents = self.commit(sha).parents
        before = parents[0] if parents else EMPTY_TREE
        patch = b""
        for chunk in self._chunks([*DIFF_COMMAND, "-p", before, sha]):
            patch += chunk
            if len(patch) > max_bytes:
                return None
        try:
            return patch.decode()
        except UnicodeDecodeError:
            return None

    def changes(self, since: str | None, until: str) -> Changes:
        """The changes from `since` to `until`. If there is no `since`, or it no longer exists, everything counts."""
        known = since is not None and self._has_commit(since)
        base = since if since is not None and known else EMPTY_TREE
        files = lines = 0
        paths: list[str] = []
        for record in self._records([*DIFF_COMMAND, "--numstat", "-z", base, until]):
            added, removed, path = record.split(b"\t", 2)
            files += 1
            lines += sum(int(number) for number in (added, removed) if number != b"-")
            if len(paths) < MAX_PATHS:
                paths.append(path.decode(errors="replace"))
        commits, rewritten = self._distance(since if known else None, until)
        return Changes(commits, files, lines, tuple(paths), rewritten or (since is not None and not known))

    def close(self) -> None:
        self._repository.close()

    def _distance(self, since: str | None, until: str) -> tuple[int | None, bool]:
        """The number of commits in between, and whether the older one is not an ancestor of the newer one."""
        if since is None:
            return (None if self._shallow_commits else int(self._output("rev-list", "--count", until, "--"))), False
        shared = self._output("merge-base", since, until, may_fail=True)
        if not shared and self._shallow_commits:
            return None, False  # the older one may be beyond the end of the shallow history
        return int(self._output("rev-list", "--count", until, f"^{since}", "--")), shared != since

    def _has_commit(self, sha: str) -> bool:
        return bool(self._output("rev-parse", "--verify", "--quiet", f"{sha}^{{commit}}", may_fail=True))

    def _require_sha1(self) -> None:
        if self._output("rev-parse", "--show-object-format") != "sha1":
            raise NotARepository(f"{self._path} uses SHA-256 for its objects, which is not supported.")

    def _read_shallow_commits(self) -> frozenset[str]:
        """The commits at which a shallow history ends."""
        path = self.folders[1] / "shallow"
        return frozenset(path.read_text().split()) if path.exists() else frozenset()

    def _output(self, *command: str, may_fail: bool = False) -> str:
        status, output, errors = self._git.execute(
            ["git", *command], with_extended_output=True, with_exceptions=False, stdout_as_string=True
        )
        if status and not may_fail:
            raise RepositoryDamaged(f"{self._path}: git {command[0]} failed: {first_error(errors)}")
        return "" if status else output

    def _records(self, command: Sequence[str]) -> Iterator[bytes]:
        """The records of git's output, which end with a zero byte each."""
        rest = b""
        for chunk in self._chunks(command):
            *records, rest = (rest + chunk).split(b"\0")
            for record in records:
                yield record.removeprefix(b"\n")

    def _chunks(self, command: Sequence[str]) -> Iterator[bytes]:
        process = self._git.execute(["git", *command], as_process=True)
        try:
            while chunk := process.stdout.read1(CHUNK_BYTES):
                yield chunk
            errors = process.stderr.read()
            if process.proc.wait():
                raise RepositoryDamaged(
                    f"{self._path}: git {command[0]} failed: {first_error(errors.decode(errors='replace'))}"
                )
        finally:
            process.proc.kill()
            process.proc.wait()
            process.proc.stdout.close()
            process.proc.stderr.close()


DIFF_COMMAND = [
    "diff-tree",
    "-r",
    "--no-renames",
    "--no-ext-diff",
    "--no-textconv",
    "--no-color",
    "--ignore-submodules=all",
]


@contextmanager
def closing_reader(reader: RepoReader) -> Generator[RepoReader]:
    try:
        yield reader
    finally:
        reader.close()


def _open(path: Path) -> git.Repo:
    try:
        return git.Repo(path, expand_vars=False)
    except git.NoSuchPathError:
        raise NotARepository(f"There is no folder {path}.") from None
    except git.InvalidGitRepositoryError:
        raise NotARepository(f"{path} is not a git repository.") from None
    except PermissionError:
        raise RepositoryUnreadable(f"The account that Forgearr runs as may not read {path}.") from None


def validate_path(path: str, branch: str | None = None) -> Path:
    """Resolve a path to the folder of a repository that has commits and is in guardian.roots. Blocks."""
    folder = checked_folder(path)
    with open_inside_roots(folder, branch) as reader:
        reader.tip()
    return folder
