"""API10, unsafe consumption of APIs: what an outside server wants of Forgearr, which asks it."""

import asyncio
import gzip
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from itertools import product
from typing import Any

import pytest

from cluster import mlflow_client
from cluster.errors import ForgearrError
from cluster.mlflow_client import MlflowRefused, MlflowUnavailable
from cluster.services.catalog import find_connector
from cluster.services.errors import BadResponse
from cluster.services.http.client import Client
from cluster.services.http.connection import Connection
from pipelines.training.deploy import ollama_push
from pipelines.training.models.registry import Registry
from pipelines.training.models.versions import VersionDamaged
from serve.engines.ollama import engine as ollama_engine
from serve.engines.ollama import transport
from serve.engines.ollama.engine import OllamaEngine
from serve.engines.protocol import EngineFailed, EngineUnavailable
from tests.support.registry_model import RegistryModel
from tests.support.services.fake_services import KEY
from tests.support.services.stub_server import (
    Handler,
    StubRequest,
    StubResponse,
    StubServer,
    html_page,
    json_response,
    stub_server,
    text_response,
)

MEBIBYTE = 1024 * 1024
PROMPT = "What is in the cellar?"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": PROMPT}]}
TWICE = {"Content-Encoding": "gzip, gzip"}


def bomb() -> bytes:
    """A kilobyte that becomes 64 MiB."""
    return gzip.compress(gzip.compress(bytes(64 * MEBIBYTE)))


@pytest.fixture
async def elsewhere() -> AsyncIterator[StubServer]:
    """Another host: whatever comes here has leaked."""
    async with stub_server(lambda _: json_response({})) as server:
        yield server


# Ollama


ASK: dict[str, Callable[[OllamaEngine], Awaitable[Any]]] = {
    "list": lambda engine: engine.models(),
    "answer": lambda engine: engine.complete("m", HELLO),
    "embed": lambda engine: engine.embed("m", [PROMPT]),
    "describe": lambda engine: engine.describe("m"),
    "load": lambda engine: engine.load("m"),
}


@pytest.mark.parametrize("request_name", ASK)
@pytest.mark.parametrize("status", [301, 307, 308])
async def test_have_prompts_sent_to_another_host_by_a_redirect(
    elsewhere: StubServer, request_name: str, status: int
) -> None:
    def redirect(request: StubRequest) -> StubResponse:
        return StubResponse(b"", status, headers={"Location": f"{elsewhere.url}{request.path}"})

    async with stub_server(redirect) as server:
        with pytest.raises(EngineUnavailable, match=r"redirects to http://127.0.0.1; if that is correct, set it as"):
            await ASK[request_name](OllamaEngine(server.url))
    assert elsewhere.requests == []


async def test_have_a_model_pushed_to_another_host_by_a_redirect(elsewhere: StubServer) -> None:
    def redirect(request: StubRequest) -> StubResponse:
        return StubResponse(b"", 307, headers={"Location": f"{elsewhere.url}{request.path}"})

    async with stub_server(redirect) as server:
        with pytest.raises(ForgearrError, match="The Ollama server at"):
            await asyncio.to_thread(ollama_push.remove_latest, server.url, "house")
    assert elsewhere.requests == []


@pytest.mark.parametrize("request_name", ASK)
@pytest.mark.parametrize("kind", ["without end", "in one line", "as a bomb"])
async def test_fill_the_memory_with_the_answer_of_a_model(
    monkeypatch: pytest.MonkeyPatch, request_name: str, kind: str
) -> None:
    monkeypatch.setattr(transport, "MAX_BYTES", MEBIBYTE)
    line = json.dumps({"message": {"role": "assistant", "content": "x" * 1000}}).encode() + b"\n"
    bodies = {"without end": line * 2000, "in one line": b"[" * 2 * MEBIBYTE, "as a bomb": bomb()}
    headers = TWICE if kind == "as a bomb" else {}
    async with stub_server(lambda _: StubResponse(bodies[kind], headers=headers)) as server:
        with pytest.raises(EngineUnavailable, match=r"sent more than 1 MiB|sent a compressed response"):
            await ASK[request_name](OllamaEngine(server.url))


WRONG: dict[str, StubResponse] = {
    "a web page": html_page("Sign in"),
    "words": text_response("all is well"),
    "nothing": StubResponse(b""),
    "a list": json_response([1, 2]),
    "a number": json_response(7),
    "null": json_response(None),
    "wrong types": json_response(
        {"models": 7, "message": 7, "response": [], "embeddings": "no", "model_info": 7, "done": "x", "error": {}}
    ),
}
UNREAD = {("load", "wrong types"), ("answer", "nothing")}
"""Of these answers, nothing is read."""


@pytest.mark.parametrize(("request_name", "kind"), [pair for pair in product(ASK, WRONG) if pair not in UNREAD])
async def test_break_a_request_with_an_answer_of_the_wrong_kind(request_name: str, kind: str) -> None:
    async with stub_server(lambda _: WRONG[kind]) as server:
        with pytest.raises(ForgearrError, match=r"does not answer as an Ollama server does|could not answer"):
            await ASK[request_name](OllamaEngine(server.url))


async def test_break_a_request_with_numbers_that_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"general.architecture": "llama", "llama.context_length": "long", "llama.block_count": [1]}
    async with stub_server(lambda _: json_response({"model_info": fields, "template": "t"})) as server:
        header = await OllamaEngine(server.url).describe("m")
    assert (header.context, header.layers, header.parameters) == (0, 0, 0)
    async with stub_server(lambda _: json_response({"embeddings": []})) as server:
        with pytest.raises(EngineFailed, match="0 embeddings for 1 texts"):
            await OllamaEngine(server.url).embed("m", [PROMPT])


@pytest.mark.parametrize("request_name", ["list", "describe"])
async def test_hold_a_request_with_a_byte_now_and_then(monkeypatch: pytest.MonkeyPatch, request_name: str) -> None:
    monkeypatch.setattr(ollama_engine, "QUERY_TIMEOUT_SECONDS", 0.5)

    async def send_slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000000\r\n\r\n")
        with suppress(ConnectionError):
            while not reader.at_eof():
                writer.write(b" ")
                await writer.drain()
                await asyncio.sleep(0.02)  # the pace of this server, well below the deadline
        writer.close()

    async with await asyncio.start_server(send_slowly, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        with pytest.raises(EngineUnavailable, match="does not answer"):
            await ASK[request_name](OllamaEngine(url))


# MLflow


async def ask_mlflow(response: Handler | StubResponse) -> Any:
    def handle(request: StubRequest) -> StubResponse:
        return response(request) if callable(response) else response

    async with stub_server(handle) as server, mlflow_client.connect(server.url) as mlflow:
        return await Registry(mlflow).models()


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("kind", sorted(WRONG.keys() - {"wrong types"}))
async def test_break_the_registry_with_an_answer_of_the_wrong_kind(kind: str) -> None:
    with pytest.raises(MlflowUnavailable, match="does not answer as an MLflow server does"):
        await ask_mlflow(WRONG[kind])


@pytest.mark.usefixtures("home")
async def test_have_mlflows_password_sent_to_another_host(elsewhere: StubServer) -> None:
    def redirect(request: StubRequest) -> StubResponse:
        return StubResponse(b"", 302, headers={"Location": elsewhere.url + request.path})

    with pytest.raises(MlflowUnavailable, match=r"redirects to another address: set mlflow\.tracking_uri"):
        await ask_mlflow(redirect)
    assert elsewhere.requests == []


@pytest.mark.usefixtures("home")
async def test_keep_a_request_busy_with_pages_without_end() -> None:
    with pytest.raises(MlflowUnavailable, match="the same page again and again"):
        await ask_mlflow(json_response({"registered_models": [], "next_page_token": "more"}))


@pytest.mark.usefixtures("home")
async def test_fill_the_memory_with_the_answer_of_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_client, "MAX_RESPONSE_BYTES", MEBIBYTE)
    large = json.dumps({"x": "x" * 2 * MEBIBYTE}).encode()
    for response in (StubResponse(large), StubResponse(gzip.compress(large), headers={"Content-Encoding": "gzip"})):
        with pytest.raises(MlflowUnavailable, match="more than 1 MiB"):
            await ask_mlflow(response)
    with pytest.raises(MlflowUnavailable, match="compressed more than once"):
        await ask_mlflow(StubResponse(bomb(), headers=TWICE))
    with pytest.raises(MlflowRefused) as refused:
        await ask_mlflow(StubResponse(b"x" * MEBIBYTE, 400))
    assert len(refused.value.message) < 1000


async def test_hide_all_models_by_one_with_changed_tags(registry_model: RegistryModel) -> None:
    await registry_model.register()
    damaged = await registry_model.register()
    registry, key = registry_model.registry, {"name": registry_model.name, "version": str(damaged.number)}
    for tag, value in {"files": "no JSON", "manner": '{"unknown": 1}', "adapter": "[]"}.items():
        body = {**key, "key": f"forgearr.{tag}", "value": value}
        await registry_model.mlflow.call("POST", "model-versions/set-tag", json=body)
        (listed,) = [model for model in await registry.models() if model.name == registry_model.name]
        assert listed == await registry.model(registry_model.name)
        assert [version.number for version in listed.versions] == [1]
        assert (await registry.find(f"{registry_model.name}:v1")).number == 1
        with pytest.raises(ForgearrError, match=f"The tags of {damaged.reference} in MLflow have been changed"):
            await registry.find(damaged.reference)
        with pytest.raises(VersionDamaged):  # for whoever deletes what no version needs
            await registry.versions(skip_damaged=False)
    await registry_model.mlflow.call("DELETE", "model-versions/delete", json=key)


# Services


@pytest.mark.usefixtures("home")
async def test_fill_the_memory_with_layers_of_compression() -> None:
    async with (
        stub_server(lambda _: StubResponse(bomb(), headers=TWICE)) as server,
        Client(Connection("Ours", find_connector("sonarr"), server.url, KEY)).open() as client,
    ):
        with pytest.raises(BadResponse, match="Ours sent a response that is compressed more than once"):
            await client.get("/api/v3/queue")
