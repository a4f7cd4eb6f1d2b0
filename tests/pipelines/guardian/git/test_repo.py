"""Reading of repositories that real git has made and changed, on this machine and over HTTP."""

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import secrets
from pipelines.guardian.git import mirrors
from pipelines.guardian.git.errors import CommitNotFound, NotARepository, RepositoryDamaged
from pipelines.guardian.git.locations import mirror_path
from pipelines.guardian.git.mirrors import BranchNotFound, EmptyRepository, FetchFailed, FetchRefused
from pipelines.guardian.git.repo import RepoReader, open_folder
from pipelines.guardian.git.urls import InvalidAddress, RemoteRepository, UnknownHost, resolve_address, validate_url
from pipelines.guardian.repositories import Credentials, Repository
from pipelines.guardian.repository_access import open_registered
from tests.support.git_repos import commit_files, git, import_commits, new_repository
from tests.support.git_server import GitServer, git_server

PASSWORD = "ada:s3cret-token"
NOWHERE = "0123456789" * 4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return new_repository(tmp_path / "work")


@pytest.fixture
def server(tmp_path: Path, home: Path) -> Iterator[GitServer]:
    """Serves the folder of this test to clients with the password."""
    with git_server(tmp_path, PASSWORD) as server:
        yield server


def make_repository(server: GitServer, token: str | None = "s3cret-token", **columns: object) -> Repository:
    credentials = None
    if token is not None:
        credentials = secrets.seal(Credentials(username="ada", token=token).model_dump_json())
    return Repository(**{"id": "repo_1", "url": f"{server.url}/work", "credentials": credentials, **columns})


def test_the_content_of_commits_is_read(folder: Path) -> None:
    first = commit_files(folder, "First\n\nSays why.\n", {"a.py": "x = 1\n", "docs/é.md": "# Hi\n"})
    (folder / "link").symlink_to("/etc/passwd")
    second = commit_files(folder, "Second", {"a.py": "x = 2\ny = 3\n", "logo.png": b"\x89PNG\0\1"})
    (folder / "a.py").write_text("not committed")

    with open_folder(folder) as checkout:
        assert checkout.tip().sha == second
        assert [(commit.sha, commit.subject, commit.body) for commit in checkout.log(second, 10)] == [
            (second, "Second", ""),
            (first, "First", "Says why."),
        ]
        assert checkout.commit(first).parents == ()
        files = {file.path: file for file in checkout.files(second)}
        assert files.keys() == {"a.py", "docs/é.md", "logo.png"}, "links are no files"
        assert checkout.read(files["a.py"].blob) == b"x = 2\ny = 3\n"
        assert files["logo.png"].bytes == 6
        patch = checkout.diff(second, 10_000)
        assert patch is not None
        assert "-x = 1\n+x = 2\n+y = 3\n" in patch
        assert "Binary files" in patch
        assert checkout.diff(second, 100) is None
        assert "+x = 1" in (checkout.diff(first, 10_000) or "")

        changes = checkout.changes(first, second)
        assert (changes.commits, changes.files, changes.lines, changes.rewritten) == (1, 3, 4, False)
        assert changes.paths == ("a.py", "link", "logo.png")
        all_changes = checkout.changes(None, second)
        assert (all_changes.commits, all_changes.files, all_changes.rewritten) == (2, 4, False)
        no_changes = checkout.changes(second, second)
        assert (no_changes.commits, no_changes.files, no_changes.lines) == (0, 0, 0)
        with pytest.raises(CommitNotFound):
            checkout.commit(NOWHERE)
        with pytest.raises(CommitNotFound):
            checkout.commit("--output=/tmp/never")
        with pytest.raises(RepositoryDamaged):
            checkout.read(NOWHERE)


def test_branches_and_bare_repositories_are_read(folder: Path, tmp_path: Path) -> None:
    main = commit_files(folder, "On main", {"a": "1"})
    git(folder, "switch", "--create", "feature/x")
    feature = commit_files(folder, "On the branch", {"a": "2"})
    git(tmp_path, "clone", "--bare", "work", "bare.git")
    git(folder, "worktree", "add", "../beside", "main")
    for path, branch, tip in (
        (folder, None, feature),
        (folder, "main", main),
        (tmp_path / "bare.git", "feature/x", feature),
        (tmp_path / "beside", None, main),
    ):
        with open_folder(path, branch) as checkout:
            assert checkout.tip().sha == tip
    with open_folder(folder, "nope") as checkout, pytest.raises(BranchNotFound):
        checkout.tip()


def test_a_folder_without_a_repository_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plain").mkdir()
    (tmp_path / "file").write_text("")
    new_repository(tmp_path / "work")
    (tmp_path / "work" / "inner").mkdir()
    for name in ("plain", "file", "missing", "work/inner"):
        with pytest.raises(NotARepository), open_folder(tmp_path / name):
            pass
    subprocess.run(["git", "init", "--quiet", "--object-format=sha256", tmp_path / "sha256"], check=True)
    with pytest.raises(NotARepository, match="SHA-256"), open_folder(tmp_path / "sha256"):
        pass


def test_an_empty_repository_is_refused(folder: Path) -> None:
    with open_folder(folder) as checkout, pytest.raises(EmptyRepository):
        checkout.tip()
    with open_folder(folder, "main") as checkout, pytest.raises(EmptyRepository):
        checkout.tip()


def test_rewritten_and_missing_history_is_recognized(folder: Path) -> None:
    commit_files(folder, "First", {"a": "1\n"})
    old = commit_files(folder, "Second", {"b": "2\n"})
    git(folder, "commit", "--amend", "--message", "Another second")
    new = commit_files(folder, "Third", {"c": "3\n"})
    with open_folder(folder) as checkout:
        changes = checkout.changes(old, new)
        assert (changes.commits, changes.paths, changes.rewritten) == (2, ("c",), True)
        since_missing = checkout.changes(NOWHERE, new)
        assert (since_missing.files, since_missing.rewritten) == (3, True), "everything counts as changed"


def test_a_shallow_clone_reports_what_is_unknown(folder: Path, tmp_path: Path) -> None:
    first = commit_files(folder, "First", {"a": "1\n"})
    commit_files(folder, "Second", {"b": "2\n"})
    third = commit_files(folder, "Third", {"c": "3\n"})
    git(tmp_path, "clone", "--depth=2", f"file://{folder}", "shallow")
    with open_folder(tmp_path / "shallow") as checkout:
        assert [commit.subject for commit in checkout.log(third, 10)] == ["Third", "Second"]
        end = list(checkout.log(third, 10))[-1]
        assert checkout.diff(end.sha, 10_000) is None, "its parent is not there"
        assert checkout.diff(third, 10_000) is not None
        assert checkout.changes(None, third).commits is None
        assert checkout.changes(end.sha, third).commits == 1
        assert checkout.changes(first, third).rewritten


def test_submodules_are_left_out(folder: Path, tmp_path: Path) -> None:
    inner = new_repository(tmp_path / "inner")
    commit_files(inner, "Inner", {"secret.py": "1"})
    git(folder, "submodule", "add", str(inner), "vendored")
    tip = commit_files(folder, "With a submodule", {"a.py": "1\n"})
    with open_folder(folder) as checkout:
        assert {file.path for file in checkout.files(tip)} == {".gitmodules", "a.py"}
        assert checkout.changes(None, tip).files == 2


def test_a_large_file_has_its_size_and_is_not_compared(folder: Path) -> None:
    with (folder / "big.txt").open("wb") as file:
        file.truncate(64 * 1024 * 1024)
    tip = commit_files(folder, "Big", {})
    with open_folder(folder) as checkout:
        (big,) = checkout.files(tip)
        assert big.bytes == 64 * 1024 * 1024
        assert checkout.changes(None, tip).lines == 0
        assert len(checkout.diff(tip, 10_000) or "") < 1000


def test_a_file_name_that_is_not_utf_8_is_read(folder: Path) -> None:
    Path(os.fsdecode(os.fsencode(folder) + b"/\xff.py")).write_text("x = 1\n")
    tip = commit_files(folder, "Odd", {"text.txt": b"\xff\xfe broken"})
    with open_folder(folder) as checkout:
        assert len([file.path.encode() for file in checkout.files(tip)]) == 2
        assert checkout.diff(tip, 10_000) is None


def test_a_long_history_is_read(folder: Path) -> None:
    tip = import_commits(folder, 20_000)
    with open_folder(folder, "main") as checkout:
        assert checkout.changes(None, tip).commits == 20_000
        assert [commit.subject for commit in checkout.log(tip, 2)] == ["Change 20000", "Change 19999"]


def test_the_configuration_of_a_repository_runs_no_program(folder: Path, tmp_path: Path) -> None:
    calls = tmp_path / "ran"
    program = tmp_path / "program"
    program.write_text(f"#!/bin/sh\necho $0 >> {calls}\ncat\n")
    program.chmod(0o755)
    commit_files(folder, "First", {".gitattributes": "* diff=evil filter=evil\n", "a.txt": "1\n"})
    tip = commit_files(folder, "Second", {"a.txt": "2\n"})
    for setting in (
        "core.fsmonitor",
        "diff.external",
        "diff.evil.command",
        "diff.evil.textconv",
        "filter.evil.smudge",
        "filter.evil.clean",
        "gpg.program",
        "core.pager",
        "core.sshCommand",
        "remote.origin.uploadpack",
    ):
        git(folder, "config", setting, str(program))
    git(folder, "config", "log.showSignature", "true")
    git(folder, "config", "remote.origin.url", f"file://{folder}")
    git(folder, "config", "core.repositoryFormatVersion", "1")
    git(folder, "config", "extensions.partialClone", "origin")
    with open_folder(folder) as checkout:
        first = checkout.tip().parents[0]
        for file in checkout.files(tip):
            checkout.read(file.blob)
        assert checkout.diff(tip, 10_000)
        checkout.changes(first, tip)
        with pytest.raises(RepositoryDamaged):
            checkout.read(NOWHERE)  # git would fetch it if that were allowed
    assert not calls.exists()


def test_repositories_of_other_owners_are_read(folder: Path) -> None:
    if os.getuid():
        pytest.skip("Only root can give a folder away.")
    tip = commit_files(folder, "First", {"a": "1"})
    for path in (folder, folder / ".git"):
        os.chown(path, 12345, 12345)
    with open_folder(folder) as checkout:
        assert checkout.tip().sha == tip


def test_git_variables_in_the_environment_are_ignored(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tip = commit_files(folder, "First", {"a": "1"})
    other = new_repository(tmp_path / "other")
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(other / ".git" / "index"))
    with open_folder(folder) as checkout:
        assert checkout.tip().sha == tip


def test_a_remote_repository_is_fetched_incrementally(
    folder: Path, server: GitServer, monkeypatch: pytest.MonkeyPatch, record_git: Callable[[], list[str]]
) -> None:
    first = commit_files(folder, "First", {"a": "1\n"})
    repository = make_repository(server)
    with open_registered(repository) as checkout:
        assert checkout.tip().sha == first
    second = commit_files(folder, "Second", {"a": "2\n"})
    repository.trained_commit = first
    with open_registered(repository) as checkout:
        assert checkout.tip().sha == second
        assert checkout.changes(first, second).commits == 1
    mirror = mirror_path(repository.id)
    for path in mirror.rglob("*"):
        assert not path.is_file() or b"s3cret" not in path.read_bytes()
    assert not any("s3cret" in line for line in record_git())
    assert os.environ.keys() & {"GIT_CONFIG_COUNT"} == set()


def test_a_force_push_keeps_the_trained_commit(folder: Path, server: GitServer) -> None:
    commit_files(folder, "First", {"a": "1\n"})
    trained = commit_files(folder, "Second", {"b": "2\n"})
    repository = make_repository(server, trained_commit=trained)
    with open_registered(repository):
        pass
    git(folder, "reset", "--hard", "HEAD~1")
    pushed = commit_files(folder, "Another second", {"c": "3\n"})
    git(folder, "reflog", "expire", "--expire=now", "--all")
    git(folder, "gc", "--prune=now", "--quiet")
    with open_registered(repository) as checkout:
        changes = checkout.changes(trained, pushed)
        assert checkout.tip().sha == pushed
        assert (changes.commits, changes.paths, changes.rewritten) == (1, ("b", "c"), True)


def test_a_lost_mirror_is_rebuilt(folder: Path, server: GitServer) -> None:
    trained = commit_files(folder, "First", {"a": "1\n"})
    tip = commit_files(folder, "Second", {"b": "2\n"})
    with open_registered(make_repository(server, id="repo_2", trained_commit=trained)) as checkout:
        assert checkout.changes(trained, tip).files == 1
    with open_registered(make_repository(server, id="repo_3", trained_commit=NOWHERE)) as checkout:
        assert checkout.changes(NOWHERE, tip).rewritten


def test_a_long_history_is_fetched_in_part(folder: Path, server: GitServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirrors, "DEPTH", 50)
    tip = import_commits(folder, 5000)
    with open_registered(make_repository(server)) as checkout:
        assert sum(1 for _ in checkout.log(tip, 10_000)) == 50
        assert checkout.changes(None, tip).commits is None


def test_a_failed_fetch_has_its_own_error_and_hides_the_token(folder: Path, server: GitServer, tmp_path: Path) -> None:
    commit_files(folder, "First", {"a": "1"})
    new_repository(tmp_path / "empty")
    for repository, error in (
        (make_repository(server, token="wrong"), FetchRefused),
        (make_repository(server, token=None), FetchRefused),
        (make_repository(server, url=f"{server.url}/nothing"), FetchRefused),
        (make_repository(server, branch="nope"), BranchNotFound),
        (make_repository(server, url=f"{server.url}/empty"), EmptyRepository),
        (make_repository(server, url="http://127.0.0.1:1/work"), FetchFailed),
    ):
        with pytest.raises(error) as raised, open_registered(repository):
            pass
        assert "s3cret" not in str(raised.value)


def test_credentials_are_not_sent_to_another_address(folder: Path, tmp_path: Path, home: Path) -> None:
    commit_files(folder, "First", {"a": "1"})
    with git_server(tmp_path) as target, git_server(tmp_path, redirect=target.url) as first:
        with pytest.raises(FetchRefused, match="another address"), open_registered(make_repository(first)):
            pass
        assert first.requests[0][1] is not None
        assert target.requests == []


def test_a_fetch_can_be_stopped_and_repeated(folder: Path, server: GitServer) -> None:
    commit_files(folder, "First", {"a": "1"})

    class Stopped(BaseException):
        pass

    def stop(_: str) -> None:
        raise Stopped

    with pytest.raises(Stopped), open_registered(make_repository(server), stop):
        pass
    lock = mirror_path("repo_1") / "shallow.lock"
    lock.touch()  # a killed process leaves it
    with open_registered(make_repository(server)) as checkout:
        assert checkout.tip().subject == "First"


@pytest.mark.parametrize(
    "url",
    [
        "file:///etc",
        "/srv/git/work",
        "ext::sh -c touch% /tmp/never",
        "git://example.com/work",
        "git@example.com:work",
        "https://ada:secret@example.com/work",
        "https://ada@example.com/work",
        "ssh://-oProxyCommand=touch/work",
        "ssh://ada:secret@example.com/work",
        "https:///work",
        "https://example.com",
        "https://example.com:99999/work",
        "https://example.com/work?x=1",
        "https://example.com/wo rk",
        "https://example.com/work\nx",
        "https://[::1/work",
    ],
)
def test_invalid_addresses_are_refused(url: str) -> None:
    with pytest.raises(InvalidAddress) as raised:
        validate_url(url)
    assert "secret" not in str(raised.value)


def test_metadata_services_of_clouds_are_refused() -> None:
    for host in ("169.254.169.254", "fe80::1", "fd00:ec2::254", "::ffff:169.254.169.254", "0.0.0.0", "2852039166"):
        with pytest.raises(InvalidAddress):
            resolve_address(host, 80)
    assert resolve_address("127.0.0.1", 80) == "127.0.0.1"
    with pytest.raises(UnknownHost):
        resolve_address("no-such-machine.invalid", 80)


def test_a_remote_hides_its_token() -> None:
    assert "s3cret" not in repr(replace(RemoteRepository("https://example.com/work", None), token="s3cret"))


def test_a_checkout_leaves_no_process_behind(folder: Path) -> None:
    import psutil

    commit_files(folder, "First", {"a": "1"})
    with open_folder(folder) as checkout:
        assert isinstance(checkout, RepoReader)
        checkout.read(next(checkout.files("HEAD")).blob)
        assert [child.name() for child in psutil.Process().children()].count("git") == 1
    assert "git" not in [child.name() for child in psutil.Process().children()]
