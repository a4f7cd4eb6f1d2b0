"""Repositories elsewhere: a mirror of each on this machine.

A mirror has the newest commits of one branch and nothing else, so that a long history costs nothing. What git is told
beside its command, credentials above all, goes through its environment: command lines are there for everybody to read.
"""

import base64
import fcntl
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import git

from cluster.errors import InvalidRequest, Unavailable
from pipelines.guardian.git.env import first_error, git_environment, last_line
from pipelines.guardian.git.urls import SCHEMES, RemoteRepository, resolve_address

DEPTH = 1000
"""How many commits back a mirror goes."""
STALLED_SECONDS = 60
TIP_REF = "refs/forgearr/tip"
PINNED_REFS = "refs/forgearr/kept"
OnProgress = Callable[[str], None]


class FetchRefused(InvalidRequest):
    """The remote repository does not let us in."""

    code = "FETCH_REFUSED"


class FetchFailed(Unavailable):
    """The remote repository cannot be fetched from."""

    code = "FETCH_FAILED"


class EmptyRepository(InvalidRequest):
    """The repository has no commit."""

    code = "EMPTY_REPOSITORY"


class BranchNotFound(InvalidRequest):
    """The repository has no such branch."""

    code = "BRANCH_NOT_FOUND"


def fetch(mirror: Path, remote: RemoteRepository, pinned: Sequence[str], on_progress: OnProgress) -> None:
    """Make the mirror what the remote repository is now. `kept` are commits that it should have too, if they still
    exist; others that the branch has left behind are let go."""
    mirror.parent.mkdir(parents=True, exist_ok=True)
    with mirror.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Whoever held the lock and was killed may have left git's own behind.
        for left in mirror.rglob("*.lock"):
            left.unlink()
        _fetch(mirror, remote, pinned, on_progress)


def _fetch(mirror: Path, remote: RemoteRepository, pinned: Sequence[str], on_progress: OnProgress) -> None:
    variables = git_environment(_configuration(remote), protocols=":".join(SCHEMES))
    if not (mirror / "HEAD").exists():
        git.Repo.init(mirror, bare=True)
    repository = git.Repo(mirror)
    repository.git.update_environment(**variables)
    source = f"refs/heads/{remote.branch}" if remote.branch else "HEAD"
    try:
        _run_fetch(repository, remote, [f"+{source}:{TIP_REF}"], on_progress)
        for commit in pinned:
            if _has_commit(repository, commit):
                repository.git.update_ref(f"{PINNED_REFS}/{commit}", commit)
            else:
                _try_fetch_commit(repository, remote, commit, on_progress)
        _delete_other_refs(repository, pinned)
    finally:
        repository.close()


def _run_fetch(
    repository: git.Repo,
    remote: RemoteRepository,
    refspecs: list[str],
    on_progress: OnProgress,
    depth: int | None = None,
) -> None:
    options = [
        "--progress",
        "--no-tags",
        "--no-recurse-submodules",
        "--no-write-fetch-head",
        f"--depth={depth or DEPTH}",
    ]
    process = repository.git.fetch(*options, "--", remote.url, *refspecs, as_process=True)
    output = b""
    try:
        while chunk := process.stderr.read1(65_536):
            output = (output + chunk)[-65_536:]
            on_progress(last_line(chunk))
        code = process.proc.wait()
    except BaseException:
        process.proc.terminate()  # it tidies up
        process.proc.wait()
        raise
    finally:
        process.proc.stdout.close()
        process.proc.stderr.close()
    if code:
        _raise_fetch_error(remote, output.decode(errors="replace"))


def _raise_fetch_error(remote: RemoteRepository, output: str) -> None:
    host = urlsplit(remote.url).hostname
    if "couldn't find remote ref HEAD" in output:
        raise EmptyRepository(f"The repository at {host} has no commit.")
    if "couldn't find remote ref" in output:
        raise BranchNotFound(f"The repository at {host} has no branch '{remote.branch}'.")
    if re.search(r"redirect|The requested URL returned error: 30\d", output):
        raise FetchRefused(f"{host} leads to another address: register that one.")
    if re.search(
        r"Authentication failed|could not read Username|error: 40[13]|Permission denied|terminal prompts", output
    ):
        raise FetchRefused(f"{host} does not let us in: check the credentials.")
    if re.search(r"not found|error: 404|does not appear to be a git repository", output):
        raise FetchRefused(f"There is no repository at {remote.url}, or it is hidden from us.")
    raise FetchFailed(f"Fetching from {host} failed: {first_error(output)}")


def _try_fetch_commit(repository: git.Repo, remote: RemoteRepository, commit: str, on_progress: OnProgress) -> None:
    """A commit that the branch has left behind may still be there to ask for; most servers hand it out."""
    try:
        _run_fetch(repository, remote, [f"+{commit}:{PINNED_REFS}/{commit}"], on_progress, depth=1)
    except (FetchRefused, FetchFailed, BranchNotFound):
        on_progress(f"{commit} is no longer there")


def _has_commit(repository: git.Repo, commit: str) -> bool:
    try:
        repository.git.cat_file("-e", f"{commit}^{{commit}}")
    except git.GitCommandError:
        return False
    return True


def _delete_other_refs(repository: git.Repo, pinned: Sequence[str]) -> None:
    for reference in repository.git.for_each_ref(PINNED_REFS, format="%(refname)").split():
        if reference.rpartition("/")[2] not in pinned:
            repository.git.update_ref("-d", reference)


def _configuration(remote: RemoteRepository) -> Mapping[str, str]:
    parts = urlsplit(remote.url)
    assert parts.hostname is not None
    port = parts.port or SCHEMES[parts.scheme]
    address = resolve_address(parts.hostname, port)
    settings = {
        # To follow is to take credentials, or a request from inside our network, to wherever somebody likes.
        "http.followRedirects": "false",
        # The address that was looked at is the one that is used.
        "http.curloptResolve": f"{parts.hostname}:{port}:{address}",
        "http.lowSpeedLimit": "1",
        "http.lowSpeedTime": str(STALLED_SECONDS),
        "credential.helper": "",
        "gc.autoDetach": "false",
        "transfer.fsckObjects": "false",
    }
    if remote.token is not None:
        pair = base64.b64encode(f"{remote.username or 'git'}:{remote.token}".encode()).decode()
        settings[f"http.{remote.url}.extraHeader"] = f"Authorization: Basic {pair}"
    return settings
