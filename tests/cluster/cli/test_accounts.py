"""`forgearr user` and `forgearr key`, which access the database directly."""

import asyncio

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from typer.testing import CliRunner, Result

from cluster import identity
from cluster.audit_log import AuditLogEntry
from cluster.cli.local import key, user
from cluster.db import Database, get_database
from cluster.errors import ForgearrError
from cluster.migrations import run_in_own_session

PASSWORD = "correct horse battery"


@pytest.fixture(autouse=True)
def own_loop(database: Database) -> None:
    """Each command runs in its own event loop, so it cannot share connections."""
    get_database.cache_clear()


def run(app: object, *arguments: str, stdin: str = "") -> Result:
    result = CliRunner().invoke(app, arguments, input=stdin, env={"COLUMNS": "200"})  # type: ignore[arg-type]
    if isinstance(result.exception, ForgearrError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result


def find(email: str) -> identity.User:
    return asyncio.run(run_in_own_session(lambda session: identity.get_user(session, email)))


def recorded() -> list[tuple[str, str | None, str | None]]:
    """Action, actor and target of all entries of the audit log."""

    async def read(session: AsyncSession) -> list[AuditLogEntry]:
        return list(await session.scalars(select(AuditLogEntry).order_by(AuditLogEntry.id)))

    return [(entry.action, entry.actor, entry.target) for entry in asyncio.run(run_in_own_session(read))]


def test_an_account_is_added_changed_disabled_and_enabled() -> None:
    run(user.app, "add", "Ada@example.com", "--admin", "--password-stdin", stdin=f"{PASSWORD}\n")
    ada = find("ada@example.com")
    assert (ada.username, ada.role, ada.is_active) == ("Ada", "admin", True)
    assert asyncio.run(identity.verify_password(ada, PASSWORD))

    run(user.app, "password", "ada@example.com", stdin="a better one\na better one\n")
    assert asyncio.run(identity.verify_password(find("ada@example.com"), "a better one"))

    run(user.app, "logout", "ada@example.com")
    assert find("ada@example.com").token_version == 2

    run(user.app, "disable", "ada@example.com")
    listed = run(user.app, "list").output
    assert "ada@example.com" in listed
    assert "disabled" in listed
    assert "argon2" not in listed
    run(user.app, "enable", "ada@example.com")
    assert find("ada@example.com").is_active
    expected = ["account.create", "password.change", "logout", "account.disable", "account.enable"]
    assert recorded() == [(action, "local", "ada@example.com") for action in expected]


def test_invalid_accounts_are_refused() -> None:
    with pytest.raises(ForgearrError, match="8 to 256 characters"):
        run(user.app, "add", "ada@example.com", "--password-stdin", stdin="short\n")
    with pytest.raises(ForgearrError, match="no account with the email bob"):
        run(user.app, "disable", "bob@example.com")


def test_a_key_is_created_listed_and_revoked() -> None:
    run(user.app, "add", "ada@example.com", "--password-stdin", stdin=f"{PASSWORD}\n")
    token = run(key.app, "create", "laptop", "--user", "ada@example.com", "--days", "30").stdout.strip()
    owner, record = asyncio.run(run_in_own_session(lambda session: identity.user_from_key(session, token)))
    assert owner.email == "ada@example.com"
    assert record.expires_at is not None

    listed = run(key.app, "list").output
    assert record.id in listed
    assert token not in listed
    run(key.app, "revoke", record.id)
    assert recorded()[1:] == [(action, "local", record.id) for action in ("key.create", "key.revoke")]
    assert record.id not in run(key.app, "list").output
