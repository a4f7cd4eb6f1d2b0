"""`forgearr backup` and `forgearr restore`: where the passphrase comes from, and what they print."""

import asyncio
from pathlib import Path

import pytest
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from typer.testing import CliRunner, Result

from cluster import secrets
from cluster.audit_log import AuditLogEntry
from cluster.cli import app
from cluster.db import get_database
from cluster.errors import ForgearrError, InvalidRequest
from cluster.migrations import run_in_own_session
from cluster.settings import get_settings

PASSPHRASE = "correct horse battery"


@pytest.fixture
def passphrase_file(tmp_path: Path) -> Path:
    path = tmp_path / "passphrase"
    path.write_text(f"{PASSPHRASE}\n")
    return path


def run(*arguments: object) -> str:
    get_database.cache_clear()
    result: Result = CliRunner().invoke(app, [*map(str, arguments)], env={"COLUMNS": "200"})
    if isinstance(result.exception, ForgearrError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_backup_is_made_recorded_and_restored(
    migrated: Path, tmp_path: Path, passphrase_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets.create_shared_keys()
    output = run("backup", tmp_path / "backup.tar", "--passphrase-file", passphrase_file)
    assert "SQLite, 4 files" in output
    assert "encrypted" in output
    assert "without the passphrase" in output
    assert PASSPHRASE not in output

    async def read(session: AsyncSession) -> list[AuditLogEntry]:
        return list(await session.scalars(select(AuditLogEntry)))

    get_database.cache_clear()
    (entry,) = asyncio.run(run_in_own_session(read))
    assert (entry.action, entry.actor, entry.target) == ("backup.create", "local", str(tmp_path / "backup.tar"))
    monkeypatch.setenv("FORGEARR_HOME", str(tmp_path / "elsewhere"))
    get_settings.cache_clear()
    output = run("restore", tmp_path / "backup.tar", "--passphrase-file", passphrase_file)
    assert f"It was made in {migrated}." in output
    assert "Restored." in output
    assert "must be set again" not in output


def test_without_secrets_it_tells_what_is_missing(
    migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run("backup", tmp_path / "backup.tar", "--without-secrets")
    assert "not encrypted" in output
    assert "Not in it: keys/ and forgearr.yaml." in output
    monkeypatch.setenv("FORGEARR_HOME", str(tmp_path / "elsewhere"))
    get_settings.cache_clear()
    output = run("restore", tmp_path / "backup.tar")
    assert "everybody must log in again" in output
    assert "`forgearr keys check` lists the secrets that must be entered again" in output
    assert "write the settings that differ from the defaults anew" in output


def test_mlflow_elsewhere_is_not_in_it(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", "https://ann:hunter2@mlflow.example")
    get_settings.cache_clear()
    output = run("backup", tmp_path / "backup.tar", "--without-secrets")
    assert "Not in it: MLflow at https://" in output
    assert "hunter2" not in output


def test_the_passphrase_comes_from_the_settings_too(
    migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_BACKUP__PASSPHRASE", PASSPHRASE)
    get_settings.cache_clear()
    run("backup", tmp_path / "backup.tar")
    monkeypatch.setenv("FORGEARR_HOME", str(tmp_path / "elsewhere"))
    assert "Restored." in run("restore", tmp_path / "backup.tar")


def test_a_missing_or_short_passphrase_is_refused(migrated: Path, tmp_path: Path, passphrase_file: Path) -> None:
    with pytest.raises(InvalidRequest, match="no terminal to ask on"):
        run("backup", tmp_path / "backup.tar")
    passphrase_file.write_text("short\n")
    with pytest.raises(InvalidRequest, match="at least 12 characters"):
        run("backup", tmp_path / "backup.tar", "--passphrase-file", passphrase_file)
    with pytest.raises(InvalidRequest, match="There is no file"):
        run("backup", tmp_path / "backup.tar", "--passphrase-file", tmp_path / "missing")
    assert not (tmp_path / "backup.tar").exists()
