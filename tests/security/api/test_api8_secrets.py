"""API8, misconfiguration: secrets that stand where others read: command lines, Ray's environments, errors, logs."""

import asyncio
import json
import logging
import os
import re
import stat
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from cluster.cli import app
from cluster.db import Database, now
from cluster.errors import SettingsError, Unavailable
from cluster.runtime import doctor, run_state, supervisor
from cluster.runtime.privacy import NotPrivate, require_private_home
from cluster.secrets import KeyMissing, create_shared_keys, seal, signing_key
from cluster.settings import NODE_SECRETS_VARIABLE, NODE_VERSION_VARIABLE, get_settings, load_settings, node_environment
from jobs.context import Context, JobLogHandler, current_context
from jobs.leases import Claim
from jobs.mlflow_sync import MlflowSync
from jobs.retry_policy import classify_error
from jobs.states import State
from jobs.tables import Job, JobEvent
from tests.support.platform import unused_ports
from tests.support.recording_link import RecordingLink
from tests.support.waiting import TIMEOUT, eventually_async

SEALING_KEY = "a-sealing-key-of-more-than-32-characters"


# Command lines and runtime environments


@pytest.mark.parametrize(
    "setting",
    [
        f"auth.sealing_key={SEALING_KEY}",
        "database.url=postgresql://ada:hunter22@db.lan/forge",
        "mlflow.tracking_uri=https://ada:hunter22@ml.lan",
        "limits.storage=redis://:hunter22@cache.lan:6379/0",
        "services.declared=[{name: TV, type: sonarr, url: 'http://tv.lan', api_key: hunter22}]",
    ],
)
def test_read_a_secret_in_a_list_of_processes(setting: str, home: Path) -> None:
    key, _, value = setting.partition("=")
    with pytest.raises(SettingsError, match=f"'{key}' is a secret, and every account") as refused:
        load_settings([setting])
    assert value not in refused.value.message


@pytest.mark.usefixtures("home")
def test_settings_that_are_no_secret_may_be_on_a_command_line() -> None:
    load_settings(["mlflow.tracking_uri=http://ml.lan:5000", "auth.sealing_key=null", "limits.storage=memory://"])


def test_read_a_password_in_the_state_of_an_installation(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = unused_ports(1)[0]
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", f"http://ada:hunter22@127.0.0.1:{port}")
    get_settings.cache_clear()
    run_state.save_run(supervisor._new_run(get_settings()))  # pyright: ignore[reportPrivateUsage]
    shown = [(home / "run" / "state.json").read_text()]
    for command in ("status", "doctor", "config show"):
        shown.append(CliRunner().invoke(app, command.split()).output)
    assert all(f"http://ada:********@127.0.0.1:{port}" in text for text in shown)
    assert not any("hunter22" in text for text in shown)


def test_read_a_secret_in_the_runtime_environment_of_a_cluster(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.mkdir(mode=0o700)
    (home / "forgearr.yaml").write_text("database: {url: 'postgresql://ada:hunter22@db.lan/forge'}\n")
    monkeypatch.setenv("FORGEARR_AUTH__SEALING_KEY", SEALING_KEY)
    monkeypatch.setenv("FORGEARR_API_KEY", "fgr_hunter22")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter22")
    monkeypatch.setenv("FORGEARR_JOBS__WORKERS", "3")
    monkeypatch.setenv("FORGEARR_OVERRIDES", "serve.port=8010")
    shared = node_environment()
    assert not any("hunter22" in value or SEALING_KEY in value for value in shared.values())
    del shared["FORGEARR_SERVICES__TIMEOUT_SECONDS"]  # of this test
    assert shared == {
        "FORGEARR_HOME": str(home),
        "FORGEARR_JOBS__WORKERS": "3",
        "FORGEARR_OVERRIDES": "serve.port=8010",
        NODE_SECRETS_VARIABLE: "auth.sealing_key database.url",
        NODE_VERSION_VARIABLE: version("forgearr"),
    }


@pytest.mark.usefixtures("home")
def test_a_node_of_another_version_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_VERSION_VARIABLE, "0.0.9")
    installed = re.escape(version("forgearr"))
    with pytest.raises(SettingsError, match=f"has Forgearr {installed}, and the installation 0\\.0\\.9: install"):
        load_settings()


def test_a_node_without_the_secrets_says_which_and_where(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(NODE_SECRETS_VARIABLE, "auth.sealing_key database.url")
    monkeypatch.setenv("FORGEARR_AUTH__SEALING_KEY", SEALING_KEY)
    with pytest.raises(SettingsError, match=r"'database\.url' is set where `forgearr up` runs, and not on this node"):
        load_settings()
    monkeypatch.setenv("FORGEARR_DATABASE__URL", "postgresql://ada:hunter22@db.lan/forge")
    load_settings()


@pytest.mark.usefixtures("home")
def test_a_node_makes_no_key_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    create_shared_keys()
    sealed, signing = seal("hunter22"), signing_key()
    monkeypatch.setenv(NODE_SECRETS_VARIABLE, "")
    assert signing_key() == signing
    monkeypatch.setenv("FORGEARR_HOME", os.environ["FORGEARR_HOME"] + "-of-a-node")
    with pytest.raises(KeyMissing, match=r"no .*/keys/signing on this node"):
        signing_key()
    with pytest.raises(KeyMissing, match=r"no .*/keys/sealing on this node"):
        seal(sealed)


# Jobs and MLflow's pages


LEAK = "GET https://ada:hunter22@tv.lan/x?apikey=hunter22 failed: Authorization: Bearer hunter22"


@pytest.mark.parametrize("error", [RuntimeError(LEAK), ValueError(LEAK), Unavailable(LEAK), MemoryError(LEAK)])
def test_read_a_secret_in_the_error_of_a_job(error: Exception, home: Path) -> None:
    message = classify_error(error, 1).to_error()["message"]
    assert "hunter22" not in message
    assert "tv.lan" in message


def test_read_a_secret_in_the_log_of_a_job() -> None:
    link = RecordingLink()
    context = Context(Claim("job_1", "t", "probe", {}, None, 1, 1, None, None, {}, "w", None), link)
    context.log(LEAK)
    token = current_context.set(context)
    try:
        JobLogHandler().emit(logging.makeLogRecord({"msg": "called %s", "args": (LEAK,), "levelname": "WARNING"}))
    finally:
        current_context.reset(token)
    assert len(link.logged) == 2
    assert not any("hunter22" in line for line in link.logged)


async def test_read_a_secret_in_a_run_of_mlflow(
    database: Database, mlflow_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", mlflow_server)
    get_settings.cache_clear()
    spec = {"url": "https://ada:hunter22@tv.lan/x", "auth": {"password": "hunter22"}, "lines": [LEAK], "steps": 3}
    job = Job(id="job_leaky", kind="leaky", spec=spec, state=State.FAILED, tracked=True, demand="1 CPU")
    job.created_by, job.run_after, job.resources, job.max_attempts = "test", now(), {"cpus": 1}, 1
    job.error = classify_error(RuntimeError(LEAK), 1).to_error()
    job.result = {"rows": [{"api_key": "hunter22"}, LEAK]}
    async with database.transaction() as session:
        session.add(job)
        await session.flush()
        session.add(JobEvent(job_id=job.id, type=State.FAILED, data={"error": job.error}, created_at=now()))
    sync = asyncio.create_task(MlflowSync(database).sync_forever())
    try:
        run = await finished_run(mlflow_server)
    finally:
        sync.cancel()
        await asyncio.gather(sync, return_exceptions=True)
    shown = json.dumps(run)
    assert "hunter22" not in shown
    assert {"key": "steps", "value": "3"} in run["data"]["params"]
    assert "tv.lan" in shown
    async with httpx.AsyncClient(base_url=mlflow_server, timeout=TIMEOUT) as client:
        where = {"run_uuid": run["info"]["run_id"], "path": "result.json"}
        result = (await client.get("/get-artifact", params=where)).json()
    assert result["rows"][0] == {"api_key": "********"}
    assert "hunter22" not in json.dumps(result)
    async with database.read_transaction() as session:
        assert await session.scalar(select(Job.mlflow_run_id)) == run["info"]["run_id"]


async def finished_run(mlflow_server: str) -> dict[str, Any]:
    query = {"filter": "tags.`forgearr.job_id` = 'job_leaky' and attributes.status = 'FAILED'"}

    def find() -> dict[str, Any] | None:
        with httpx.Client(base_url=mlflow_server, timeout=TIMEOUT) as client:
            named = client.get("/api/2.0/mlflow/experiments/get-by-name", params={"experiment_name": "leaky"})
            if not named.is_success:
                return None
            experiment = named.json()["experiment"]["experiment_id"]
            found = client.post("/api/2.0/mlflow/runs/search", json={**query, "experiment_ids": [experiment]})
            return next(iter(found.json().get("runs", [])), None)

    return await eventually_async(find)


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
