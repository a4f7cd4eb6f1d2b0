"""Key files: created once, and refused when they are not whole."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster import secrets
from cluster.cli import app
from cluster.secrets import KeyDamaged


@pytest.mark.parametrize("content", ["", "\n", "a" * 31, "0" * 16 + "\n"])
def test_a_damaged_key_is_never_used(home: Path, content: str) -> None:
    (home / "keys").mkdir(parents=True)
    for name in secrets.KEYS:
        (home / "keys" / name).write_text(content)
    expected = f"it has {len(content.strip())} characters, and a key has at least 32. Restore it from a backup."
    for use in (lambda: secrets.seal("text"), lambda: secrets.unseal("text"), secrets.signing_key, secrets.check_keys):
        with pytest.raises(KeyDamaged, match=expected):
            use()
    assert (home / "keys" / "sealing").read_text() == content


def test_up_and_doctor_refuse_a_damaged_key(home: Path) -> None:
    (home / "keys").mkdir(parents=True, mode=0o700)
    (home / "keys" / "sealing").touch(mode=0o600)
    result = CliRunner().invoke(app, ["up"], env={"COLUMNS": "500"})
    assert isinstance(result.exception, KeyDamaged)
    checked = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "500"})
    assert checked.exit_code == 1
    assert "keys/sealing in FORGEARR_HOME is damaged" in " ".join(checked.output.split())


def test_processes_that_create_a_key_together_use_the_same_one(home: Path) -> None:
    home.mkdir()
    with ThreadPoolExecutor(8) as threads:
        futures = [threads.submit(secrets.signing_key) for _ in range(8)]
    keys = [future.result() for future in futures]
    assert len(set(keys)) == 1
    assert [path.name for path in (home / "keys").iterdir()] == ["signing"]


def test_a_draft_that_a_killed_process_has_left_is_no_obstacle(home: Path) -> None:
    """In a container, the next process has the same number."""
    (home / "keys").mkdir(parents=True)
    (home / "keys" / f"signing.{os.getpid()}").touch()
    assert len(secrets.signing_key()) >= secrets.MIN_KEY_LENGTH
