"""API8, misconfiguration: what another account of this machine wants from FORGEARR_HOME."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.runtime import doctor
from cluster.runtime.privacy import NotPrivate, require_private_home
from cluster.secrets import signing_key
from cluster.settings import get_settings
from tests.support.platform import unused_ports
from tests.support.waiting import TIMEOUT


def test_read_the_home_of_another_account(home: Path) -> None:
    home.mkdir(mode=0o700)
    home.chmod(0o755)
    refused = forgearr("up")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == f"Other accounts of this machine can read {home}: run `chmod 700 {home}`.\n"
    assert [finding.fix for finding in doctor.run_checks(get_settings()) if finding.subject == "home"] == [
        f"Run `chmod 700 {home}`."
    ]


def test_read_a_key_of_another_account(home: Path) -> None:
    signing_key()
    (home / "keys").chmod(0o750)
    (home / "keys" / "signing").chmod(0o640)
    commands = f"chmod 700 {home / 'keys'} && chmod 600 {home / 'keys' / 'signing'}"
    with pytest.raises(NotPrivate, match=f"run `{commands}`"):
        require_private_home()


@pytest.mark.usefixtures("home")
def test_read_what_a_running_installation_writes(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        require_private_home()
        (tmp_path / "file").touch()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o600


@pytest.mark.skipif(os.getuid() != 0, reason="Only root can give a folder away.")
def test_be_the_owner_of_another_accounts_home(home: Path) -> None:
    home.mkdir(mode=0o700)
    os.chown(home, 12345, 12345)
    with pytest.raises(NotPrivate, match="belongs to another account"):
        require_private_home()


def test_read_the_database_of_another_account(home: Path, tmp_path: Path) -> None:
    """Also one that an older version has made, in a home that was open then."""
    home.mkdir(mode=0o755)
    (home / "forgearr.db").touch(mode=0o644)
    code = "import os; os.umask(0); from cluster.cli import main; main()"
    command = [sys.executable, "-c", code, "user", "add", "ada@example.com", "--password-stdin"]
    password = "correct horse battery\n"
    subprocess.run(command, input=password, capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert {stat.S_IMODE(file.stat().st_mode) for file in home.glob("forgearr.db*")} == {0o600}


def forgearr(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own, with this test's home, and ports that nothing uses."""
    names = ("SERVE__PORT", "RAY__PORT", "RAY__DASHBOARD_PORT", "MLFLOW__PORT")
    ports = {f"FORGEARR_{name}": str(port) for name, port in zip(names, unused_ports(len(names)), strict=True)}
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    environment = {**os.environ, **ports}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT, check=False)
