"""Git hooks: installed into real repositories and run by real git, with and without a server to tell."""

import asyncio
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn
from sqlalchemy import select

from cluster.db import Database, with_own_database
from cluster.settings import get_settings
from jobs.states import State
from jobs.tables import Job
from serve.app import create_app
from tests.support.git_repos import commit_files, git, new_repository
from tests.support.waiting import TIMEOUT, eventually


@pytest.fixture
def folder(tmp_path: Path, migrated: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository where repositories may lie, with a commit."""
    monkeypatch.setenv("FORGEARR_GUARDIAN__ROOTS", f"['{tmp_path}']")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    get_settings.cache_clear()
    folder = new_repository(tmp_path / "work")
    commit_files(folder, "First", {"a": "1\n"})
    return folder


@pytest.fixture
def server(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A real gateway under uvicorn, to which the command line speaks."""
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


def looks() -> list[Job]:
    """The looks that were asked for."""

    async def read(database: Database) -> list[Job]:
        async with database.read_transaction() as session:
            return list(await session.scalars(select(Job).where(Job.kind == "watch_repo")))

    return asyncio.run(with_own_database(read))


def log_of(folder: Path) -> str:
    """What the last hook has to say, once it has ended."""
    log = folder / ".git" / "hooks" / "forgearr-hook.log"
    return eventually(lambda: log.read_text() if log.exists() else None)


@pytest.mark.usefixtures("server")
def test_a_commit_has_the_repository_looked_at(folder: Path, tmp_path: Path) -> None:
    added = forgearr("repo", "add", str(folder), "--name", "work", "--set", "enabled=false")
    assert added.returncode == 0, added.stderr
    assert looks() == []
    assert forgearr("hook", "install", str(folder)).returncode == 0
    commit_files(folder, "Second", {"b": "1\n"})
    assert "checks it" in log_of(folder)
    (asked,) = looks()
    assert asked.state == State.QUEUED

    listed = forgearr("repo", "list")
    assert "work" in listed.stdout
    checked = forgearr("repo", "check", "work")
    assert asked.id in checked.stdout, "the same one, which still waits"
    assert forgearr("repo", "remove", str(folder)).returncode == 0
    gone = forgearr("repo", "check", str(folder))
    assert (gone.returncode, "is not registered" in gone.stderr) == (1, True)


@pytest.mark.usefixtures("server")
def test_a_push_into_a_bare_repository_is_told_too(folder: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--bare", "work", "bare.git")
    assert forgearr("repo", "add", str(tmp_path / "bare.git"), "--set", "enabled=false").returncode == 0
    installed = forgearr("hook", "install", str(tmp_path / "bare.git"), "--repository", "bare")
    assert installed.returncode == 0, installed.stderr
    git(folder, "remote", "add", "origin", str(tmp_path / "bare.git"))
    commit_files(folder, "Second", {"b": "1\n"})
    git(folder, "push", "origin", "main")
    eventually(looks)


def test_git_neither_fails_nor_waits_when_nothing_answers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        monkeypatch.setenv("FORGEARR_URL", f"http://127.0.0.1:{deaf.getsockname()[1]}")
        assert forgearr("hook", "install", str(folder)).returncode == 0
        commit_files(folder, "Second", {"b": "1\n"})
        # Git has ended, and only now is the hook heard: it still waits for an answer.
        deaf.settimeout(TIMEOUT)
        connection, _ = deaf.accept()
        assert b"/api/v1/repos" in connection.recv(1000)
        connection.close()
    assert "Nothing answers" in log_of(folder)


def test_a_hook_that_was_there_is_still_called(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_URL", "http://127.0.0.1:1")
    hook = folder / ".git" / "hooks" / "post-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f"#!/bin/sh\ncat > {tmp_path}/heard\necho $1 >> {tmp_path}/heard\nexit 7\n")
    hook.chmod(0o755)
    for _ in range(2):
        assert forgearr("hook", "install", str(folder)).returncode == 0
    done = subprocess.run([hook, "x"], cwd=folder, input=b"old new refs/heads/main\n", capture_output=True, check=False)
    assert done.returncode == 7
    assert (tmp_path / "heard").read_text() == "old new refs/heads/main\nx\n"
    assert "Nothing answers" in log_of(folder)

    assert forgearr("hook", "remove", str(folder)).returncode == 0
    assert "exit 7" in hook.read_text()
    assert not (folder / ".git" / "hooks" / "post-commit").exists()
    assert "There are no hooks" in forgearr("hook", "remove", str(folder)).stdout


def test_hooks_of_others_are_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    git(folder, "config", "core.hooksPath", str(tmp_path / "shared"))
    refused = forgearr("hook", "install", str(folder))
    assert (refused.returncode, "other repositories share" in refused.stderr) == (1, True)
    assert list((tmp_path / "shared").iterdir()) == []
    plain = forgearr("hook", "install", str(tmp_path))
    assert (plain.returncode, "not a git repository" in plain.stderr) == (1, True)
    assert forgearr("hook", "install", str(tmp_path / "missing")).returncode == 1
    no_key = forgearr("hook", "install", str(folder), "--key-file", str(tmp_path / "missing"))
    assert (no_key.returncode, "There is no file" in no_key.stderr) == (1, True)
