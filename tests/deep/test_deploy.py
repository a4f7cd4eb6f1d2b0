"""Deployments and rollbacks on a whole platform, during requests."""

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import httpx
import pytest

from cluster import mlflow_client
from tests.support.platform import Platform, running_platform
from tests.support.registry_model import RegistryModel
from tests.support.services.fake_ollama import FakeOllama, running_fake_ollama
from tests.support.small_models import write_constant_model
from tests.support.waiting import TIMEOUT, eventually

pytestmark = [pytest.mark.platform, pytest.mark.deep]

FIRST, SECOND = "I am the first version.", "I am the second version."
CLIENTS = 6


@pytest.fixture(scope="module")
def ollama() -> Iterator[FakeOllama]:
    with running_fake_ollama() as server:
        yield server


@pytest.fixture(scope="module")
def platform(ollama: FakeOllama) -> Iterator[Platform]:
    with running_platform({"ollama.url": ollama.url}) as platform:
        yield platform


@pytest.fixture
def name(home: Path, platform: Platform, tmp_path: Path) -> str:
    """A model with two versions, each of which answers with its number."""

    async def register() -> str:
        async with mlflow_client.connect(platform.mlflow_url) as mlflow:
            registry_model = RegistryModel(mlflow, tmp_path)
            for number, text in enumerate((FIRST, SECOND), 1):
                await registry_model.register(write_constant_model(tmp_path / f"{number}.gguf", text).read_bytes())
                await registry_model.pass_validation(number)
            return registry_model.name

    platform.wait_for_mlflow()
    return asyncio.run(register())


def test_a_switch_of_versions_fails_no_request(platform: Platform, ollama: FakeOllama, name: str) -> None:
    platform.cli("deploy", name, "1")
    assert ask(platform, name) == FIRST
    stop = Event()

    def send_requests(streamed: bool) -> list[str]:
        answers: list[str] = []
        while not stop.is_set():
            answers.append(ask(platform, f"{name}:latest", streamed=streamed))
        return answers

    with ThreadPoolExecutor(CLIENTS) as threads:
        clients = [threads.submit(send_requests, number % 2 == 0) for number in range(CLIENTS)]
        try:
            for command, expected in (
                (("deploy", name, "2"), SECOND),
                (("rollback", name), FIRST),
                (("deploy", name, "2"), SECOND),
            ):
                platform.cli(*command)
                eventually(lambda expected=expected: ask(platform, name) == expected)
                assert {ask(platform, name) for _ in range(10)} == {expected}
            assert platform.http.delete(f"/api/v1/models/{name}/versions/1").status_code == httpx.codes.NO_CONTENT
            assert {ask(platform, name) for _ in range(10)} == {SECOND}
        finally:
            stop.set()
        answers = [answer for client in clients for answer in client.result()]
    assert set(answers) == {FIRST, SECOND}
    assert len(answers) > 10 * CLIENTS
    assert ollama.models[f"{name}:latest"] == ollama.models[f"{name}:v2"]
    model = platform.http.get(f"/api/v1/models/{name}").json()
    assert (model["served_version"], [version["version"] for version in model["versions"]]) == (2, [2])


def test_a_file_that_no_engine_can_load_is_not_served(platform: Platform, name: str, tmp_path: Path) -> None:
    async def register_invalid_file() -> None:
        async with mlflow_client.connect(platform.mlflow_url) as mlflow:
            registry_model = RegistryModel(mlflow, tmp_path)
            registry_model.name = name
            await registry_model.register(b"GGUF, or so it says")

    platform.cli("deploy", name, "1")
    asyncio.run(register_invalid_file())
    refused = platform.cli("deploy", name, "3", check=False)
    assert (refused.returncode, refused.stdout) == (1, "")
    assert "never validated" in refused.stderr
    failed = platform.cli("deploy", name, "3", "--force", check=False)
    assert failed.returncode == 1
    assert "failed" in failed.stdout
    assert ask(platform, name) == FIRST
    assert platform.http.get(f"/api/v1/models/{name}").json()["served_version"] == 1


def ask(platform: Platform, model: str, *, streamed: bool = False) -> str:
    """Ask the model over a new connection, and return its answer. Any error fails the test."""
    request = {"model": model, "messages": [{"role": "user", "content": "Who are you?"}], "temperature": 0}
    response = httpx.post(f"{platform.url}/v1/chat/completions", json={**request, "stream": streamed}, timeout=TIMEOUT)
    assert response.status_code == 200, response.text
    if not streamed:
        return response.json()["choices"][0]["message"]["content"]
    lines = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    chunks = [json.loads(line) for line in lines]
    return "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
