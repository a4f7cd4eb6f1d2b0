"""The checks of `forgearr doctor`, and the fixes that it suggests."""

import asyncio
import os
import socket
from pathlib import Path

import pytest
from sqlalchemy import text
from typer.testing import CliRunner

from cluster.cli import app
from cluster.db import get_database
from cluster.migrations import migrate
from cluster.runtime import doctor
from cluster.runtime.doctor import CheckResult
from cluster.settings import get_settings
from tests.support.platform import unused_ports


@pytest.fixture(autouse=True)
def free_ports(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("SERVE__PORT", "RAY__PORT", "RAY__DASHBOARD_PORT", "MLFLOW__PORT")
    for name, port in zip(names, unused_ports(len(names)), strict=True):
        monkeypatch.setenv(f"FORGEARR_{name}", str(port))


def findings(subject: str) -> list[CheckResult]:
    return [finding for finding in doctor.run_checks(get_settings()) if finding.subject == subject]


async def set_schema(version: str | None) -> None:
    await migrate()
    async with get_database().transaction() as session:
        if version:
            await session.execute(text("UPDATE alembic_version SET version_num = :version"), {"version": version})
    await get_database().close()


def test_a_fresh_installation_passes_all_checks() -> None:
    result = CliRunner().invoke(app, ["doctor"])
    assert result.exit_code == 0, result.output
    assert "fail" not in {line.split()[0] for line in result.output.splitlines()}
    assert "SQLite; the first `forgearr up` creates it" in result.output
    subjects = {finding.subject for finding in doctor.run_checks(get_settings())}
    assert {"python", "ray", "mlflow", "home", "disk", "memory", "port"} <= subjects
    assert {"haproxy", "git", "database", "gpu"} <= subjects


def test_a_busy_port_fails_with_the_setting_that_changes_it() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", get_settings().serve.port))
        listener.listen()
        result = CliRunner().invoke(app, ["doctor"])
        assert result.exit_code == 1
        assert f"{get_settings().serve.port} (serve.port) cannot be used" in result.output
        assert "--set serve.port=" in result.output


def test_a_missing_git_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert [(finding.level, finding.text) for finding in findings("git")] == [
        ("warn", "not installed, so no repository can be read")
    ]


def test_a_home_that_others_can_read_fails(home: Path) -> None:
    get_settings()
    home.chmod(0o755)
    assert [finding.level for finding in findings("home")] == ["fail"]
    assert findings("home")[0].fix == f"Run `chmod 700 {home}`."


def test_a_key_that_others_can_read_fails(home: Path) -> None:
    get_settings()
    (home / "keys").mkdir(mode=0o700)
    key = home / "keys" / "signing"
    key.touch(mode=0o600)
    key.write_text("0123456789abcdef" * 4)
    assert findings("keys") == []
    key.chmod(0o644)
    assert [(finding.level, finding.fix) for finding in findings("keys")] == [("fail", f"Run `chmod 600 {key}`.")]


@pytest.mark.parametrize(
    ("version", "level", "part"), [(None, "ok", "schema "), ("9999", "fail", "written by a newer version")]
)
def test_the_schema_of_the_database(version: str | None, level: str, part: str) -> None:
    asyncio.run(set_schema(version))
    get_database.cache_clear()
    [finding] = findings("database")
    assert finding.level == level
    assert part in finding.text


def test_a_database_that_cannot_be_reached_fails_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    port = unused_ports(1)[0]
    monkeypatch.setenv("FORGEARR_DATABASE__URL", f"postgresql://ada:hunter22@127.0.0.1:{port}/forge")
    get_settings.cache_clear()
    [finding] = findings("database")
    assert finding.level == "fail"
    assert "hunter22" not in finding.text + finding.fix
    assert "database.url" in finding.fix


def test_an_external_mlflow_that_does_not_answer_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", f"http://127.0.0.1:{unused_ports(1)[0]}")
    get_settings.cache_clear()
    assert [finding.level for finding in findings("mlflow")] == ["ok", "warn"]  # the package, and the server


def test_a_gpu_driver_that_hangs_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(doctor, "COMMAND_TIMEOUT_SECONDS", 0.5)
    [finding] = findings("gpu")
    assert (finding.level, finding.text) == ("warn", "nvidia-smi fails: no answer within 0.5 seconds")
