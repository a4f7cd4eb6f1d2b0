"""A leak hunt: secrets that can be recognized are put into everything that takes one. Afterwards they are nowhere else.

The services, the hub and the git server repeat all that they are sent, in each form of an error. The busy hour is made
of events: jobs fail with secrets in their errors, services are checked and audited, people log in wrongly.
"""

import asyncio
import base64
import json
import os
import re
import subprocess
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import asyncpg
import httpx
import psutil
import pytest
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from cluster.runtime import embedded
from cluster.runtime.processes import MARKER_VARIABLE
from cluster.settings import load_settings
from tests.conftest import new_postgres_database
from tests.support.platform import BINARIES, Platform, running_platform
from tests.support.services.echoing_server import EchoingServer, echoing_server
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

MARK = "leak5cq8xz"
"""Every secret that this test chooses begins with it, and its name follows."""
SERVICES = {"sonarr": "json", "radarr": "page", "sabnzbd": "redirect", "plex": "text", "qbittorrent": "json"}
"""Types of service, and the kind of answer that each gets."""
OWN_KEYS = ("mlflow", "ray", "signing", "sealing")
SAMPLE_SECONDS = 0.2


def secret(name: str) -> str:
    """A secret of more than 32 characters that tells where it was used."""
    return f"{MARK}{name.replace(' ', '')}".ljust(40, "0")


class Hunt:
    """Looks for the secrets in bytes, also in Base64, as Basic authorization has them."""

    def __init__(self) -> None:
        self.patterns = dict.fromkeys(_base64_variants(MARK), "in Base64")
        self.found: list[str] = []

    def add(self, name: str, value: str) -> None:
        """A secret that the platform has made."""
        assert len(value) > 16
        self.patterns |= {value.encode(): name} | dict.fromkeys(_base64_variants(value), f"{name} in Base64")

    def search(self, place: object, content: bytes) -> None:
        for found in re.findall(rb"%b\w*" % MARK.encode(), content):
            self.found.append(f"{place}: {found.decode()}")
        self.found += [f"{place}: {name}" for pattern, name in self.patterns.items() if pattern in content]


def _base64_variants(text: str) -> list[bytes]:
    """What Base64 makes of a text, wherever it begins: the characters that do not depend on what is around it."""
    encoded = [base64.b64encode(b"x" * shift + text.encode()) for shift in range(3)]
    return [variant[-(-shift * 4 // 3) :].rstrip(b"=")[:-1] for shift, variant in enumerate(encoded)]


@pytest.fixture
def server() -> Generator[EchoingServer]:
    with echoing_server() as server:
        yield server


@pytest.fixture
async def database_url(postgres_server: str) -> str:
    """The server takes any password, so that one can be in the URL."""
    url = await new_postgres_database(postgres_server, template="template0")
    return url.replace("postgres@", f"postgres:{secret('database')}@")


@pytest.fixture
def platform(
    database_url: str, server: EchoingServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Generator[Platform]:
    monkeypatch.setenv("HF_TOKEN", f"hf_{secret('hub')}")
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/json")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    modules = [*load_settings().settings.jobs.modules, "tests.support.job_kinds"]
    declared = {"name": "Declared", "type": "prowlarr", "url": f"{server.url}/text", "api_key": secret("declared")}
    settings = {
        "auth.required": "true",
        "auth.signing_key": secret("signing"),
        "auth.sealing_key": secret("sealing"),
        "database.url": database_url,
        "jobs.modules": f"[{', '.join(modules)}]",
        "limits.enabled": "false",
        "limits.storage": f"redis://:{secret('redis')}@127.0.0.1:9/0",
        "services.declared": json.dumps([declared]),
    }
    with running_platform(settings, with_admin=True) as platform:
        yield platform


def test_no_secret_is_anywhere_but_where_it_belongs(
    platform: Platform, server: EchoingServer, database_url: str, tmp_path: Path
) -> None:
    hunt = Hunt()
    for name in OWN_KEYS:
        if (file := platform.home / "keys" / name).exists():
            hunt.add(f"the key {name}", file.read_text().strip())
    keys = {
        user: platform.cli("key", "create", "hunt", "--user", user).stdout.split()[-1] for user in _accounts(platform)
    }
    for user, key in keys.items():
        hunt.add(f"the API key of {user}", key)
    platform.http.headers["X-API-Key"] = keys["ada@example.com"]
    with _watched_processes(platform, hunt):
        _log_in_wrongly(platform, hunt, keys["uli@example.com"])
        ids = _use_services(platform, server) | _use_repositories(platform, server)
        jobs = [platform.submit("leaky"), _train_a_closed_model(platform), platform.submit("check_services")]
        ids |= {"job_id": jobs[0]}
        for job_id in [*jobs, *_unfinished(platform)]:
            platform.wait_for(job_id)
        assert platform.job(jobs[0])["state"] == platform.job(jobs[1])["state"] == "failed"
        _wait_for_the_run_of(platform, jobs[0])
        heard = " ".join(server.heard)
        for name in (*SERVICES, "declared", "hub"):
            assert secret(name) in heard, f"the server was not sent the secret {name}"
        assert any(variant.decode() in heard for variant in _base64_variants(MARK)), "git sent no password"
        for place, content in _answers(platform, keys.values(), ids):
            hunt.search(place, content)
    for command in ("config show", "status", "status --json", "doctor", "logs", "key list", "jobs list"):
        process = _forgearr(platform, command, keys["ada@example.com"])
        hunt.search(f"forgearr {command}", process.stdout + process.stderr)
    places = [platform.home, embedded.private_folder(platform.home), asyncio.run(_data_directory(database_url))]
    assert sum(1 for place in places for _ in _files(place)) > 100
    for file in (file for place in places for file in _files(place) if file.parent != platform.home / "keys"):
        with suppress(OSError):  # a file of Ray, or of the database, that is gone by now
            hunt.search(file, file.read_bytes())
    assert sorted(set(hunt.found)) == []


# The busy hour


def _accounts(platform: Platform) -> list[str]:
    command = [str(BINARIES / "forgearr"), "user", "add", "uli@example.com", "--password-stdin"]
    subprocess.run(command, input=secret("password"), env=platform.environment, text=True, check=True, timeout=TIMEOUT)
    return ["ada@example.com", "uli@example.com"]


def _log_in_wrongly(platform: Platform, hunt: Hunt, key: str) -> None:
    """And once rightly. All that was sent, and the tokens that come back, are secrets."""
    login = {"email": "uli@example.com", "password": secret("password")}
    with httpx.Client(base_url=platform.url, timeout=TIMEOUT) as client:
        for wrong in ({"password": secret("wrong password")}, {"password": {"x": secret("nested")}}):
            assert client.post("/api/v1/auth/login", json={**login, **wrong}).status_code in {401, 422}
        tokens = client.post("/api/v1/auth/login", json=login).raise_for_status().json()
        hunt.add("an access token", tokens["access_token"])
        hunt.add("a refresh token", tokens["refresh_token"])
        wrong_refresh = {"refresh_token": f"refresh_{secret('refresh')}"}
        assert client.post("/api/v1/auth/refresh", json=wrong_refresh).status_code == 401
        wrong_headers = [{"X-API-Key": f"fgr_{secret('key')}"}, {"Authorization": f"Bearer {secret('bearer')}"}]
        for headers in wrong_headers:
            assert client.get("/api/v1/jobs", headers=headers).status_code == 401
        client.get("/api/v1/jobs", params={"api_key": key, "token": secret("query")})
        change = {"current_password": secret("former"), "new_password": "x"}
        client.put("/api/v1/auth/password", json=change, headers={"X-API-Key": key})
    for query in (f"api_key={key}", f"token={secret('socket')}"):
        with suppress(InvalidStatus), connect(f"ws{platform.url[4:]}/ws/client-1?{query}") as socket:
            socket.send('{"type": "ping"}')
            socket.recv(TIMEOUT)


def _use_services(platform: Platform, server: EchoingServer) -> dict[str, Any]:
    """Add a service of each type; test it, ask it, call a tool, audit it, and change its key to an impossible one."""
    ids: list[int] = []
    for kind, answer in SERVICES.items():
        key = f"admin:{secret(kind)}" if kind == "qbittorrent" else secret(kind)
        service = {"name": f"My {kind}", "type": kind, "url": f"{server.url}/{answer}", "api_key": key}
        ids.append(_post(platform, "/api/services", service).json()["id"])
        assert _post(platform, f"/api/services/{ids[-1]}/test").json()["success"] is False
        assert platform.http.get(f"/health/{kind}").status_code in {200, 503}
    refused = {"name": "Wrong", "type": "sonarr", "url": f"http://x:{secret('url')}@127.0.0.1:9", "api_key": "k"}
    impossible = {**refused, "url": server.url, "api_key": f"{secret('impossible')}\n"}
    for service in (refused, impossible, {**impossible, "api_key": [secret("list")]}):
        assert platform.http.post("/api/services", json=service).status_code in {400, 422}
    for kind, tool in (("sonarr", "get_queue"), ("sabnzbd", "get_queue"), ("qbittorrent", "get_torrents")):
        call = platform.http.post(f"/api/v1/mcp/{kind}/call", json={"tool": tool, "arguments": {}})
        assert call.status_code >= 400 or "error" in call.text, call.text
    for path in ("/api/v1/shows/", "/api/v1/movies/", "/api/v1/downloads/queue", "/api/v1/media/libraries"):
        platform.http.get(path)
    platform.http.post("/api/v1/config/audit", json={"include_web_search": False})
    return {"service_id": ids[0], "server": "sonarr", "service": "sonarr"}


def _use_repositories(platform: Platform, server: EchoingServer) -> dict[str, Any]:
    credentials = {"username": "ada", "token": secret("repository")}
    remote = {"name": "handbook", "url": f"{server.url}/realm/handbook.git", "credentials": credentials}
    repository = _post(platform, "/api/v1/repos", {**remote, "webhook_secret": secret("webhook")}).json()["id"]
    address = server.url.replace("//", f"//ada:{secret('inside')}@")
    inside = {"name": "inside", "url": f"{address}/realm/inside.git"}
    assert platform.http.post("/api/v1/repos", json=inside).status_code in {400, 422}
    headers = {"X-Gitlab-Token": secret("wrong webhook"), "X-Gitlab-Event": "Push Hook"}
    path = "/webhooks/gitlab?repository=handbook"
    assert platform.http.post(path, json={}, headers=headers).status_code == 401
    pushed = {"ref": "refs/heads/main", "repository": {"git_http_url": remote["url"]}}
    platform.http.post(path, json=pushed, headers={**headers, "X-Gitlab-Token": secret("webhook")})
    platform.http.post(f"/api/v1/repos/{repository}/check")
    eventually(lambda: platform.http.get(f"/api/v1/repos/{repository}").json()["check_error"])
    return {"repository": repository}


def _train_a_closed_model(platform: Platform) -> str:
    return platform.submit("fine_tune", spec={"base_model": "org/private", "data": {"dataset": "demo/homelab"}})


def _unfinished(platform: Platform) -> list[str]:
    jobs = platform.http.get("/api/v1/jobs", params={"limit": 100}).json()["items"]
    return [job["id"] for job in jobs if job["state"] in {"queued", "running"}]


def _wait_for_the_run_of(platform: Platform, job_id: str) -> None:
    """The error of the job is in MLflow."""
    eventually(lambda: platform.job(job_id)["mlflow_run_id"])

    def is_there() -> bool:
        with httpx.Client(base_url=platform.mlflow_url, timeout=TIMEOUT) as mlflow:
            run = mlflow.get("/api/2.0/mlflow/runs/get", params={"run_id": platform.job(job_id)["mlflow_run_id"]})
        return run.json()["run"]["info"]["status"] == "FAILED"

    eventually(is_there)


def _post(platform: Platform, path: str, body: object = None) -> httpx.Response:
    response = platform.http.post(path, json=body)
    assert response.is_success, response.text
    return response


# Where secrets could be


@contextmanager
def _watched_processes(platform: Platform, hunt: Hunt) -> Generator[None]:
    """Look at the command lines of all processes again and again, and at environments for what is in none of them."""
    seen: dict[bytes, str] = {}
    stop = Event()
    settings = {value for name, value in platform.environment.items() if name.startswith(("FORGEARR_", "HF_TOKEN"))}

    def watch() -> None:
        while not stop.wait(SAMPLE_SECONDS):
            for process in psutil.process_iter():
                with suppress(psutil.Error, OSError):
                    command = " ".join(process.cmdline())
                    seen[command.encode(errors="replace")] = "a command line"
                    variables = process.environ()
                    if variables.get(MARKER_VARIABLE) == str(platform.home):
                        # The settings themselves belong there. Git, and the programs it starts, get credentials so.
                        others = {name: value for name, value in variables.items() if value not in settings}
                        if not process.name().startswith("git"):
                            seen[json.dumps(others).encode()] = f"the environment of {command[:80]}"

    watching = Thread(target=watch)
    watching.start()
    try:
        yield
    finally:
        stop.set()
        watching.join()
    assert len(seen) > 20
    for content, place in seen.items():
        hunt.search(place, content)


def _answers(platform: Platform, keys: Iterable[str], ids: dict[str, Any]) -> Iterator[tuple[str, bytes]]:
    """What every GET route answers to each caller."""
    document = platform.http.get("/api/v1/openapi.json")
    yield "the OpenAPI document", document.content
    paths = [path for path, operations in document.json()["paths"].items() if "get" in operations]
    assert len(paths) > 60
    for key in (*keys, ""):
        headers = {"X-API-Key": key} if key else {}
        with httpx.Client(base_url=platform.url, headers=headers, timeout=TIMEOUT) as client:
            for path in paths:
                address = re.sub(r"{(\w+)}", lambda match: str(ids.get(match[1], "unknown")), path)
                response = client.get(address)
                assert response.status_code < 500 or response.status_code == 503, (address, response.text)
                yield f"GET {address}", response.content + json.dumps(dict(response.headers)).encode()


def _forgearr(platform: Platform, command: str, key: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**platform.environment, "FORGEARR_API_KEY": key}
    return subprocess.run(
        [str(BINARIES / "forgearr"), *command.split()],
        env=environment,
        capture_output=True,
        timeout=TIMEOUT,
        check=False,
    )


def _files(place: Path) -> Iterator[Path]:
    """Also those that have appeared just now; no sockets."""
    for folder, _, names in os.walk(place):
        yield from (file for name in names if (file := Path(folder, name)).is_file() and not file.is_symlink())


async def _data_directory(url: str) -> Path:
    connection = await asyncpg.connect(url, timeout=TIMEOUT)
    try:
        # What is in memory is written to the files of the tables, too.
        await connection.execute("CHECKPOINT")
        return Path(await connection.fetchval("SHOW data_directory")).parent
    finally:
        await connection.close()
