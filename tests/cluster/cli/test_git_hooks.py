"""Git hooks in real repositories, run by real git, with and without a server."""

import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from sqlalchemy import select

from cluster.db import Database, run_with_database
from cluster.settings import get_settings
from jobs.states import State
from jobs.tables import Job
from serve.app import create_app
from tests.support.git_repos import commit_files, git, new_repository
from tests.support.waiting import TIMEOUT, eventually


@pytest.fixture
def folder(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a commit, in an allowed folder."""
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"['{tmp_path}']")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    get_settings.cache_clear()
    folder = new_repository(tmp_path / "work")
    commit_files(folder, "First", {"a": "1\n"})
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A gateway under uvicorn for the command line."""
    listener = socket.create_server(("127.0.0.1", 0))
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    gateway = uvicorn.Server(uvicorn.Config(create_app(), log_level="error"))
    thread = threading.Thread(target=gateway.run, args=([listener],))
    thread.start()
    monkeypatch.setenv("FORGEARR_URL", url)
    yield url
    gateway.should_exit = True
    thread.join()
    listener.close()


def forgearr(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def watch_jobs() -> list[Job]:
    """Return the jobs that check a repository."""

    async def read(database: Database) -> list[Job]:
        async with database.read_transaction() as session:
            return list(await session.scalars(select(Job).where(Job.kind == "watch_repo")))

    return run_with_database(read)


def log_of(folder: Path) -> str:
    """Return the output of the last hook, once it has ended."""
    log = folder / ".git" / "hooks" / "forgearr-hook.log"
    return eventually(lambda: log.read_text() if log.exists() else None)


@pytest.mark.usefixtures("server")
def test_a_commit_queues_a_check_of_the_repository(folder: Path, tmp_path: Path) -> None:
    added = forgearr("repo", "add", str(folder), "--name", "work", "--set", "enabled=false")
    assert added.returncode == 0, added.stderr
    assert watch_jobs() == []
    assert forgearr("hook", "install", str(folder)).returncode == 0
    commit_files(folder, "Second", {"b": "1\n"})
    assert "checks it" in log_of(folder)
    (job,) = watch_jobs()
    assert job.state == State.QUEUED

    listed = forgearr("repo", "list")
    assert "work" in listed.stdout
    checked = forgearr("repo", "check", "work")
    assert job.id in checked.stdout, "the same job, which is still queued"
    assert forgearr("repo", "remove", str(folder)).returncode == 0
    unknown = forgearr("repo", "check", str(folder))
    assert (unknown.returncode, "is not registered" in unknown.stderr) == (1, True)


@pytest.mark.usefixtures("server")
def test_a_push_to_a_bare_repository_queues_a_check(folder: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--bare", "work", "bare.git")
    assert forgearr("repo", "add", str(tmp_path / "bare.git"), "--set", "enabled=false").returncode == 0
    installed = forgearr("hook", "install", str(tmp_path / "bare.git"), "--repository", "bare")
    assert installed.returncode == 0, installed.stderr
    git(folder, "remote", "add", "origin", str(tmp_path / "bare.git"))
    commit_files(folder, "Second", {"b": "1\n"})
    git(folder, "push", "origin", "main")
    eventually(watch_jobs)


def test_git_neither_fails_nor_waits_without_a_server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("FORGEARR_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert forgearr("hook", "install", str(folder)).returncode == 0
        commit_files(folder, "Second", {"b": "1\n"})
        # Git has ended, and the hook still waits for a response.
        silent.settimeout(TIMEOUT)
        connection, _ = silent.accept()
        assert b"/api/v1/repos" in connection.recv(1000)
        connection.close()
    assert "Nothing answers" in log_of(folder)


def test_an_existing_hook_is_still_called(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_URL", "http://127.0.0.1:1")
    hook = folder / ".git" / "hooks" / "post-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ncat > {tmp_path}/heard\necho $1 >> {tmp_path}/heard\nexit 7\n")
    hook.chmod(0o755)
    for _ in range(2):
        assert forgearr("hook", "install", str(folder)).returncode == 0
    process = subprocess.run(
        [hook, "x"], cwd=folder, input=b"old new refs/heads/main\n", capture_output=True, check=False
    )
    assert process.returncode == 7
    assert (tmp_path / "heard").read_text() == "old new refs/heads/main\nx\n"
    assert "Nothing answers" in log_of(folder)

    assert forgearr("hook", "remove", str(folder)).returncode == 0
    assert "exit 7" in hook.read_text()
    assert not (folder / ".git" / "hooks" / "post-commit").exists()
    assert "There are no hooks" in forgearr("hook", "remove", str(folder)).stdout


def test_hooks_of_other_repositories_are_not_changed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    git(folder, "config", "core.hooksPath", str(tmp_path / "shared"))
    refused = forgearr("hook", "install", str(folder))
    assert (refused.returncode, "other repositories share" in refused.stderr) == (1, True)
    assert list((tmp_path / "shared").iterdir()) == []
    not_a_repository = forgearr("hook", "install", str(tmp_path))
    assert (not_a_repository.returncode, "not a git repository" in not_a_repository.stderr) == (1, True)
    assert forgearr("hook", "install", str(tmp_path / "missing")).returncode == 1
    no_key = forgearr("hook", "install", str(folder), "--key-file", str(tmp_path / "missing"))
    assert (no_key.returncode, "There is no file" in no_key.stderr) == (1, True)
