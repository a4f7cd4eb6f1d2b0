"""The sealing key is replaced without the loss of a secret, and a lost one is told by what must be entered again."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, event, select
from sqlalchemy.ext.asyncio import AsyncSession
from typer.testing import CliRunner, Result

from cluster import identity, secrets
from cluster.audit_log import AuditLogEntry
from cluster.cli import app
from cluster.db import Database, get_database
from cluster.errors import SettingsError, Unauthenticated
from cluster.migrations import run_in_own_session
from cluster.ownership import LOCAL
from cluster.runtime import run_state
from cluster.runtime.run_state import AlreadyRunning
from cluster.secrets import SealBroken, signing_key, unseal
from cluster.services import store as service_store
from cluster.services.store import Service
from cluster.settings import get_settings
from pipelines.guardian import repositories
from pipelines.guardian.repositories import Credentials, Repository, RepositoryRequest
from tests.support.api_client import ApiClient
from tests.support.waiting import TIMEOUT
from tests.test_rooms import PACKAGES, ROOT

NAMES = [
    "the key of the service 'TV'",
    "the credentials of the repository 'handbook'",
    "the webhook's secret of the repository 'handbook'",
]
OPENED = ["key-of-tv", {"username": None, "token": "token-of-git"}, "secret-of-the-webhook"]
OLD, NEW = "o" * 40, "n" * 40


class Crash(BaseException):
    """The process ends here."""


async def add_secrets(session: AsyncSession) -> None:
    tv = {"name": "TV", "type": "sonarr", "url": "http://127.0.0.1:9", "api_key": "key-of-tv"}
    await service_store.create(session, tv, "test")
    await service_store.create(session, {"name": "Plain", "type": "plex", "url": "http://127.0.0.1:9"}, "test")
    request = RepositoryRequest(
        name="handbook",
        url="https://git.example.com/ada/handbook.git",
        credentials=Credentials(token="token-of-git"),
        webhook_secret="secret-of-the-webhook",
    )
    await repositories.create(session, request, LOCAL)


@pytest.fixture
def stored(database: Database) -> None:
    """Secrets in all columns. Each command has its own event loop, so it cannot share connections."""
    get_database.cache_clear()
    asyncio.run(run_in_own_session(add_secrets))


def rows() -> tuple[Service, Repository]:
    async def read(session: AsyncSession) -> tuple[Service, Repository]:
        services = await session.scalars(select(Service).where(Service.name == "TV"))
        return services.one(), (await session.scalars(select(Repository))).one()

    return asyncio.run(run_in_own_session(read))


def sealed() -> list[str]:
    service, repository = rows()
    values = [service.api_key, repository.credentials, repository.webhook_secret]
    return [value for value in values if value]


def opened() -> list[Any]:
    key, credentials, webhook = map(unseal, sealed())
    return [key, json.loads(credentials), webhook]


def keys(*arguments: str) -> Result:
    umask = os.umask(0o022)
    try:
        result = CliRunner().invoke(app, ["keys", *arguments])
    finally:
        os.umask(umask)  # the command has set its own
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@contextmanager
def crash_at(step: int) -> Generator[Callable[[], int]]:
    """End the process before the operation of this number on a file, or the commit. Yields a count of all."""
    count = 0

    def operation(*_: object) -> None:
        nonlocal count
        count += 1
        if count == step:
            raise Crash

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            operation()
            return function(*arguments, **options)

        return call

    event.listen(Engine, "commit", operation)
    try:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("link", "replace", "unlink", "fsync"):
                patch.setattr(os, name, counted(getattr(os, name)))
            yield lambda: count
    finally:
        event.remove(Engine, "commit", operation)


@pytest.mark.both_databases
@pytest.mark.usefixtures("stored")
def test_everything_is_sealed_with_a_new_key(home: Path) -> None:
    before, old_key = sealed(), (home / "keys" / "sealing").read_text()
    changed_at = [row.updated_at for row in rows()]
    assert keys("rotate").output == "3 stored secrets are sealed with the new key.\n"
    assert opened() == OPENED
    assert [row.updated_at for row in rows()] == changed_at
    new_key = (home / "keys" / "sealing").read_text()
    assert [path.name for path in (home / "keys").iterdir()] == ["sealing"]
    assert (home / "keys" / "sealing").stat().st_mode & 0o777 == 0o600
    for value in before:
        with pytest.raises(SealBroken, match="`forgearr keys check`"):
            unseal(value)
    after = sealed()
    (home / "keys" / "sealing").write_text(old_key)
    for value in after:
        with pytest.raises(SealBroken):
            unseal(value)
    assert new_key != old_key

    async def read(session: AsyncSession) -> AuditLogEntry:
        return (await session.scalars(select(AuditLogEntry))).one()

    entry = asyncio.run(run_in_own_session(read))
    assert (entry.action, entry.actor, entry.target) == ("keys.rotate", "local", "sealing")
    assert entry.details == {"secrets": 3, "unreadable": 0}


@pytest.mark.usefixtures("stored")
def test_a_crash_at_any_moment_leaves_everything_readable(home: Path) -> None:
    step, crashes = 1, 0
    while True:
        with crash_at(step) as count:
            try:
                keys("rotate")
            except Crash:
                crashes += 1
        assert opened() == OPENED, f"after a crash at operation {step} of {count()}"
        if count() < step:
            break
        keys("rotate")
        assert opened() == OPENED
        assert not (home / "keys" / secrets.OLD_SEALING_KEY).exists()
        step += 1
    assert crashes >= 8  # two for the old name, three for the new key, two commits, two for the end


@pytest.mark.usefixtures("stored")
def test_a_change_that_has_not_finished_is_told_and_goes_on_with_its_key(home: Path) -> None:
    secrets.new_sealing_key()
    new_key = (home / "keys" / "sealing").read_text()
    assert "An old sealing key is accepted too" in keys("check").output
    assert "an old sealing key is accepted too" in CliRunner().invoke(app, ["doctor"]).output
    keys("rotate")
    assert (home / "keys" / "sealing").read_text() == new_key
    assert keys("check").output == "All stored secrets can be opened.\n"


@pytest.mark.usefixtures("stored")
def test_keys_are_not_replaced_while_forgearr_runs(home: Path) -> None:
    before = (home / "keys" / "sealing").read_text()
    with run_state.exclusive_lock(), pytest.raises(AlreadyRunning):
        keys("rotate")
    assert (home / "keys" / "sealing").read_text() == before


def test_a_key_of_the_settings_is_replaced_there(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    def choose(new: str, old: str | None = None) -> None:
        monkeypatch.setenv("FORGEARR_AUTH__SEALING_KEY", new)
        monkeypatch.setenv("FORGEARR_AUTH__OLD_SEALING_KEY", old or "null")
        get_settings.cache_clear()
        get_database.cache_clear()

    choose(OLD)
    asyncio.run(run_in_own_session(add_secrets))
    with pytest.raises(SettingsError, match=r"Give its value to auth\.old_sealing_key"):
        keys("rotate")
    choose(NEW, OLD)
    assert opened() == OPENED
    assert keys("rotate").output.endswith("Remove auth.old_sealing_key now, on every node.\n")
    choose(NEW)
    assert opened() == OPENED


async def test_a_lost_key_is_told_by_what_must_be_entered_again(api: ApiClient, home: Path) -> None:
    async with api.database.transaction() as session:
        await add_secrets(session)
    (home / "keys" / "sealing").unlink()
    code, output = await asyncio.to_thread(forgearr, "keys", "check")
    listed = [tuple(part.strip() for part in line.split("  ", 1)) for line in output.splitlines()[1:]]
    assert (code, [name for name, _ in listed]) == (1, NAMES)
    assert not (home / "keys" / "sealing").exists()
    assert "3 stored secrets cannot be opened" in (await asyncio.to_thread(forgearr, "doctor"))[1]
    assert (await asyncio.to_thread(forgearr, "keys", "rotate"))[1].startswith("0 stored secrets are sealed")

    values = {
        "api_key": "key-of-tv",
        "credentials": {"token": "token-of-git"},
        "webhook_secret": "another-for-the-hook",
    }
    for left, (_, entered_by) in reversed(list(enumerate(reversed(listed)))):
        method, path, _, field = entered_by.split()
        changed = await api.request("admin", method, path, json={field: values[field]})
        assert changed.status_code == 200, changed.text
        code, output = await asyncio.to_thread(forgearr, "keys", "check")
        assert (code, len(output.splitlines())) == ((1, 1 + left) if left else (0, 1))


def test_a_lost_key_of_a_declared_service_is_entered_by_up(migrated: Path) -> None:
    async def add(session: AsyncSession) -> None:
        tv = {"name": "TV", "type": "sonarr", "url": "http://127.0.0.1:9", "api_key": "key-of-tv", "declared": True}
        await service_store.create(session, tv, "settings")

    asyncio.run(run_in_own_session(add))
    (migrated / "keys" / "sealing").unlink()
    assert "forgearr up, from services.declared" in keys("check").output


@pytest.mark.usefixtures("database")
def test_a_new_signing_key_ends_all_logins_and_no_api_key() -> None:
    get_database.cache_clear()

    async def add(session: AsyncSession) -> tuple[str, str, str]:
        user = await identity.add_user(session, email="ada@example.com", username="ada", password_hash="-", role="user")
        _, key = await identity.create_key(session, user.id, "laptop", None)
        return identity.create_access_token(user), await identity.start_login(session, user), key

    access, refresh, key = asyncio.run(run_in_own_session(add))
    before = signing_key()
    keys("rotate", "--signing")
    assert signing_key() != before

    async def use(session: AsyncSession) -> None:
        with pytest.raises(Unauthenticated):
            await identity.user_from_access_token(session, access)
        assert await identity.user_from_refresh_token(session, refresh) is None
        assert (await identity.user_from_key(session, key))[0].username == "ada"

    asyncio.run(run_in_own_session(use))


def test_each_module_that_seals_names_its_columns() -> None:
    own = {ROOT / "cluster" / "secrets.py", ROOT / "cluster" / "sealing" / "columns.py"}
    modules = {file: file.read_text() for package in PACKAGES for file in (ROOT / package).rglob("*.py")}
    sealing = {file: text for file, text in modules.items() if re.search(r"\bseal\(", text) and file not in own}
    assert {file.stem for file in sealing} == {"store", "repositories"}
    assert [file for file, text in sealing.items() if "contains_secrets(" not in text] == []


def forgearr(*arguments: str) -> tuple[int, str]:
    """Run the command in a process of its own. Returns its exit code and output."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    return result.returncode, result.stdout + result.stderr
