"""Fetch remote repositories into mirrors on this machine.

A mirror is shallow: it has the newest commits of one branch, so that a long history costs nothing. Credentials and
other settings are passed to git in its environment, because all users of the machine can read command lines.
"""

import base64
import fcntl
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import git

from cluster.errors import InvalidRequest, Unavailable
from pipelines.guardian.git.env import first_error, git_environment, last_line
from pipelines.guardian.git.urls import SCHEMES, RemoteRepository, resolve_address

DEPTH = 1000
"""The number of commits in a mirror."""
STALLED_SECONDS = 60
TIP_REF = "refs/forgearr/tip"
PINNED_REFS = "refs/forgearr/kept"
OnProgress = Callable[[str], None]


class FetchRefused(InvalidRequest):
    """The remote repository refuses access."""

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
    """Update the mirror from the remote repository.

    `pinned` are commits that the mirror should keep even if they are no longer in the branch, as far as the remote
    repository still has them.
    """
    mirror.parent.mkdir(parents=True, exist_ok=True)
    with mirror.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        # A process that was killed while it held our lock may have left locks of git behind.
        for git_lock in mirror.rglob("*.lock"):
            git_lock.unlink()
        _fetch(mirror, remote, pinned, on_progress)


def _fetch(mirror: Path, remote: RemoteRepository, pinned: Sequence[str], on_progress: OnProgress) -> None:
    variables = _environment(remote)
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
        process.proc.terminate()  # git then removes its temporary files
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
        raise FetchRefused(f"{host} redirects to another address: register that one.")
    if re.search(
        r"Authentication failed|could not read Username|error: 40[13]|Permission denied|terminal prompts", output
    ):
        raise FetchRefused(f"{host} refuses access: check the credentials.")
    if re.search(r"not found|error: 404|does not appear to be a git repository", output):
        raise FetchRefused(f"There is no repository at {remote.url}, or the credentials have no access to it.")
    raise FetchFailed(f"Fetching from {host} failed: {first_error(output)}")


def _try_fetch_commit(repository: git.Repo, remote: RemoteRepository, commit: str, on_progress: OnProgress) -> None:
    """Fetch a commit that is no longer in the branch. Most servers still have it for some time."""
    try:
        _run_fetch(repository, remote, [f"+{commit}:{PINNED_REFS}/{commit}"], on_progress, depth=1)
    except (FetchRefused, FetchFailed, BranchNotFound):
        on_progress(f"The remote repository no longer has {commit}")


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


def _environment(remote: RemoteRepository) -> dict[str, str]:
    """The environment of git. It connects to the address that was checked, whatever DNS answers then."""
    parts = urlsplit(remote.url)
    assert parts.hostname is not None
    port = parts.port or SCHEMES[parts.scheme]
    address = resolve_address(parts.hostname, port)
    settings = {
        # A redirect could send the credentials elsewhere, or the request to a machine inside our network.
        "http.followRedirects": "false",
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
    # The key of the server is still the one that is known by its name.
    known_as = parts.hostname if port == SCHEMES["ssh"] else f"[{parts.hostname}]:{port}"
    ssh_options = [f"HostName={address.strip('[]')}", f"HostKeyAlias={known_as}"]
    return git_environment(settings, ":".join(SCHEMES), ssh_options)
