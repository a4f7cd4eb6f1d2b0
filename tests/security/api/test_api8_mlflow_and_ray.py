"""API8, misconfiguration: what a program or a web page on this machine wants from MLflow and Ray."""

import asyncio
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster import mlflow_client
from cluster.mlflow_client import MlflowRefused
from cluster.runtime import embedded
from cluster.secrets import mlflow_password, ray_token_path
from cluster.settings import get_settings, load_settings
from tests.support.registry_model import RegistryModel
from tests.support.waiting import TIMEOUT

SEARCH = "/api/2.0/mlflow/experiments/search?max_results=10"
ALIAS = "/api/2.0/mlflow/registered-models/alias"


@pytest.fixture
def stranger(mlflow_server: str) -> Iterator[httpx.Client]:
    """A program of another account: it reaches the port, and has no password."""
    url = httpx.URL(mlflow_server)
    with httpx.Client(base_url=f"http://{url.host}:{url.port}", timeout=TIMEOUT) as client:
        yield client


@pytest.fixture
def password(mlflow_server: str) -> str:
    return httpx.URL(mlflow_server).password


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", SEARCH),
        ("GET", "/"),
        ("GET", "/version"),
        ("GET", "/health/"),
        ("GET", "/get-artifact?path=x&run_uuid=y"),
        ("GET", "/ajax-api/2.0/mlflow/experiments/search?max_results=1"),
        ("GET", "/api/2.0/mlflow-artifacts/artifacts"),
        ("PUT", "/api/2.0/mlflow-artifacts/artifacts/0/x/artifacts/model.gguf"),
        ("POST", "/graphql"),
        ("OPTIONS", SEARCH),
    ],
)
def test_use_mlflow_without_its_password(method: str, path: str, stranger: httpx.Client, password: str) -> None:
    credentials: list[Any] = [None, ("forgearr", "wrong"), ("admin", password), ("", "")]
    for auth in credentials:
        response = stranger.request(method, path, auth=auth)
        assert response.status_code == 401
        assert response.headers["www-authenticate"].startswith("Basic ")
    for header in ("", "Basic", "Bearer", "Bearer wrong", f"Digest {password}", password):
        assert stranger.request(method, path, headers={"Authorization": header}).status_code == 401


async def test_serve_a_version_of_its_own(registry_model: RegistryModel, stranger: httpx.Client) -> None:
    """Whoever moves the alias `served` has llama.cpp load a file of their own, as our account."""
    await registry_model.register()
    body = {"name": registry_model.name, "alias": "served", "version": "1"}
    assert (await asyncio.to_thread(stranger.post, ALIAS, json=body)).status_code == 401
    assert (await registry_model.registry.model(registry_model.name)).served is None


@pytest.mark.parametrize(
    "host",
    ["10.evil.example:{port}", "192.168.evil.example:{port}", "fd00:evil", "evil.example:{port}", "127.0.0.1:1", ""],
)
def test_read_mlflow_from_a_page_that_rebinds_its_name(host: str, stranger: httpx.Client, password: str) -> None:
    """Also if the page has made a person type the password."""
    headers = {"Host": host.format(port=stranger.base_url.port)}
    for auth in (None, ("forgearr", password)):
        assert stranger.get(SEARCH, headers=headers, auth=auth).status_code == 403


@pytest.mark.parametrize("origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://127.0.0.1:{port}"])
def test_change_mlflow_from_a_page_in_the_browser_of_somebody_who_is_logged_in(
    origin: str, stranger: httpx.Client, password: str
) -> None:
    headers = {"Origin": origin.format(port=stranger.base_url.port)}
    for method, path in (("GET", SEARCH), ("POST", ALIAS)):
        response = stranger.request(method, path, headers=headers, auth=("forgearr", password))
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
    preflight = stranger.options(ALIAS, headers={**headers, "Access-Control-Request-Method": "POST"})
    assert preflight.status_code == 403


def test_a_person_with_the_password_uses_mlflow(stranger: httpx.Client, password: str) -> None:
    assert stranger.get("/health").text == "OK"
    port = stranger.base_url.port
    for headers in ({"Host": f"localhost:{port}"}, {"Origin": f"http://127.0.0.1:{port}"}, {}):
        assert stranger.get(SEARCH, headers=headers, auth=("forgearr", password)).status_code == 200
    assert stranger.get(SEARCH, headers={"Authorization": f"Bearer {password}"}).status_code == 200
    page = stranger.get("/", auth=("forgearr", password))
    assert page.headers["content-type"].startswith("text/html")


async def test_our_own_client_gets_the_password_from_the_home_only_for_our_own_mlflow(
    home: Path, mlflow_server: str, password: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = httpx.URL(mlflow_server)
    monkeypatch.setenv("FORGEARR_MLFLOW__PORT", str(url.port))
    get_settings.cache_clear()
    mlflow_password()
    (home / "keys" / "mlflow").write_text(password)
    async with mlflow_client.connect(f"http://127.0.0.1:{url.port}") as mlflow:
        assert (await mlflow.call("GET", SEARCH.removeprefix("/api/2.0/mlflow/")))["experiments"]
    async with mlflow_client.connect(f"http://localhost:{url.port}") as mlflow:
        with pytest.raises(MlflowRefused, match="401"):
            await mlflow.call("GET", SEARCH.removeprefix("/api/2.0/mlflow/"))


# Ray


def test_use_ray_without_its_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The token is a file of this account, and no variable, which Ray would show and pass on."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "inherited")
    environment = embedded.environment(load_settings().settings)
    assert environment["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in environment
    path = Path(environment["RAY_AUTH_TOKEN_PATH"])
    assert path == ray_token_path()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert len(path.read_text()) >= 32
    assert not any(path.read_text() in value for value in environment.values())
    assert not any(path.read_text() in part for part in embedded.ray_command(load_settings().settings))
