"""Ollama's API, through its official client, with an engine in this process."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from gguf import GGUFReader

from cluster.db import now
from cluster.settings import get_settings
from pipelines.training.models.registry import OnProgress
from serve.app import create_app
from serve.engines.gguf.replica import GgufEngine
from serve.engines.protocol import Source
from tests.support.app_server import running_app
from tests.support.small_models import write_constant_model, write_model
from tests.support.waiting import TIMEOUT, eventually_async

TINY = "forgearr/tiny"  # the only model that needs no registry
HELLO: Any = [{"role": "user", "content": "Hello"}]
TEXT = "Radarr looks for movies, größer als je zuvor ✓ and sorts them."
CALL = {"name": "get_weather", "arguments": {"soon": True}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather",
        "parameters": {"type": "object", "properties": {"soon": {"type": "boolean"}}, "required": ["soon"]},
    },
}
MEASURED = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


class Gateway:
    """A gateway on a real port, and the engine behind it."""

    def __init__(self, url: str, engine: GgufEngine, file: Path) -> None:
        self.url = url
        self.engine = engine
        self.file = file
        self.client = ollama.AsyncClient(host=url)

    async def chat(self, **options: Any) -> Any:
        chat: Any = self.client.chat
        return await chat(**{"model": TINY, "messages": HELLO, **options})

    async def generate(self, **options: Any) -> Any:
        generate: Any = self.client.generate
        return await generate(**{"model": TINY, "prompt": "Hello", **options})

    async def curl(self, path: str, body: bytes) -> httpx.Response:
        """Send a request as `curl -d` does."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT) as http:
            return await http.post(path, content=body, headers=headers)


@pytest.fixture
async def gateway(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    get_settings.cache_clear()
    file = write_constant_model(tmp_path / "model.gguf", TEXT)

    async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
        return file

    app = create_app()
    app.state.engine = engine = GgufEngine(get_settings().engines, find_file)
    async with running_app(app) as address:
        gateway = Gateway(f"http://{address}", engine, file)
        async with gateway.client:
            yield gateway


async def test_a_chat_response(gateway: Gateway) -> None:
    response = await gateway.chat()
    assert (response.model, response.message.role, response.message.content) == (TINY, "assistant", TEXT)
    assert (response.done, response.done_reason) == (True, "stop")
    assert response.prompt_eval_count > 5
    assert response.eval_count > 5
    assert all(response[name] > 0 for name in MEASURED)
    assert response.total_duration > response.eval_duration


async def test_a_streamed_chat_response(gateway: Gateway) -> None:
    parts = [part async for part in await gateway.chat(stream=True)]
    assert "".join(part.message.content for part in parts) == TEXT
    assert len(parts) > 2
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count > 5
    assert all(parts[-1][name] > 0 for name in MEASURED)


async def test_a_prompt_is_completed(gateway: Gateway) -> None:
    response = await gateway.generate(system="Be brief.")
    assert (response.response, response.done_reason) == (TEXT, "stop")
    parts = [part async for part in await gateway.generate(stream=True)]
    assert "".join(part.response for part in parts) == TEXT


async def test_a_raw_prompt_is_completed_without_the_template(gateway: Gateway) -> None:
    """The constant model generates its text after a newline. The template adds one, and a raw prompt must have it."""
    raw = await gateway.generate(prompt="assistant\n", raw=True)
    assert raw.response == TEXT
    templated = await gateway.generate(prompt="assistant\n")
    assert templated.prompt_eval_count > raw.prompt_eval_count
    parts = [part async for part in await gateway.generate(prompt="assistant\n", raw=True, stream=True)]
    assert "".join(part.response for part in parts) == TEXT


async def test_the_synchronous_client(gateway: Gateway) -> None:
    """The synchronous client, in another thread than the server's."""

    def chat() -> str | None:
        with ollama.Client(host=gateway.url) as client:
            return client.chat(model=TINY, messages=HELLO).message.content

    assert await asyncio.to_thread(chat) == TEXT


@pytest.mark.parametrize("stream", [True, False])
async def test_tools_are_called_and_their_results_accepted(gateway: Gateway, stream: bool) -> None:
    write_constant_model(gateway.file, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>")
    response = await gateway.chat(tools=[WEATHER], stream=stream)
    parts = [part async for part in response] if stream else [response]
    (call,) = [call for part in parts for call in part.message.tool_calls or []]
    assert (call.function.name, call.function.arguments) == ("get_weather", {"soon": True})
    assert parts[-1].done_reason == "stop"
    # The next request contains the message unchanged, and the result of the tool.
    message = next(part.message for part in parts if part.message.tool_calls)
    message.tool_calls[0].function.arguments["since"] = 10**20
    result = {"role": "tool", "tool_name": "get_weather", "content": "rain"}
    assert (await gateway.chat(messages=[*HELLO, message, result], tools=[WEATHER])).message.tool_calls


async def test_options_take_effect(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    short = await gateway.chat(options={"num_predict": 3, "temperature": 0.5, "seed": 7, "num_ctx": 8192})
    assert (short.eval_count, short.done_reason) == (3, "length")
    again = await gateway.chat(options=ollama.Options(num_predict=3, temperature=0.5, seed=7))
    assert again.message.content == short.message.content
    scored = await gateway.chat(options={"num_predict": 4, "temperature": 0}, logprobs=True, top_logprobs=2)
    assert all(len(token.top_logprobs) == 2 and token.logprob <= 0 for token in scored.logprobs)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_response_follows_the_format(gateway: Gateway, stream: bool) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    schema = {"type": "object", "properties": {"up": {"type": "boolean"}}, "required": ["up"]}
    response = await gateway.chat(format=schema, options={"num_predict": 60, "temperature": 0}, stream=stream)
    parts = [part async for part in response] if stream else [response]
    assert json.loads("".join(part.message.content for part in parts)).keys() == {"up"}


async def test_empty_requests_load_and_unload_a_model(gateway: Gateway) -> None:
    loaded = await gateway.client.chat(model=TINY, messages=[])
    assert (loaded.done, loaded.done_reason) == (True, "load")
    (running,) = (await gateway.client.ps()).models
    assert running.name == f"{TINY}:latest"
    assert running.size is not None
    assert running.size > 0
    unloaded = await gateway.client.generate(model=f"{TINY}:latest", prompt="", keep_alive=0)
    assert unloaded.done_reason == "unload"
    assert (await gateway.client.ps()).models == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_with_keep_alive_0_is_unloaded(gateway: Gateway, stream: bool) -> None:
    response = await gateway.chat(keep_alive="0s", stream=stream)
    if stream:
        _ = [part async for part in response]
    await eventually_async(lambda: gateway.engine.loaded_models == [])
    await gateway.chat(keep_alive="1h30m")
    assert len(gateway.engine.loaded_models) == 1


async def test_the_last_keep_alive_applies(gateway: Gateway) -> None:
    async def expires_at() -> datetime:
        (running,) = (await gateway.client.ps()).models
        assert running.expires_at is not None
        return running.expires_at

    await gateway.chat(keep_alive="1h30m")
    assert timedelta(minutes=80) < await expires_at() - now() < timedelta(minutes=90)
    await gateway.client.generate(model=TINY, prompt="", keep_alive=-1)
    assert (await expires_at()).year > 2300
    await gateway.chat(keep_alive=600)
    assert await expires_at() - now() < timedelta(minutes=10)
    await gateway.chat()  # without keep_alive, the setting applies
    assert (await expires_at()).year > 2300
    await gateway.client.embed(model=TINY, input="Is Plex up?", keep_alive=0.05)
    await eventually_async(lambda: gateway.engine.loaded_models == [])


async def test_idle_models_are_unloaded_after_the_configured_time(
    gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_ENGINES__KEEP_ALIVE", "50ms")
    get_settings.cache_clear()

    async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
        return gateway.file

    engine = GgufEngine(get_settings().engines, find_file)
    for _ in range(2):
        completion = await engine.complete(TINY, {"messages": HELLO})
        assert completion["choices"][0]["message"]["content"] == TEXT
        await eventually_async(lambda: engine.loaded_models == [])


async def test_a_disconnected_client_frees_its_slot(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    stream = await gateway.chat(stream=True)
    await anext(stream)
    await stream.aclose()
    assert (await gateway.chat(options={"num_predict": 1})).eval_count == 1


async def test_curl_needs_no_content_type(gateway: Gateway) -> None:
    response = await gateway.curl("/api/chat", json.dumps({"model": TINY, "messages": HELLO}).encode())
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == TEXT


@pytest.mark.parametrize(
    ("options", "status", "reason"),
    [
        ({"model": "nobody"}, 404, "There is no model 'nobody'"),
        ({"options": {"temprature": 1}}, 422, "temprature"),
        ({"options": {"temperature": "hot"}}, 422, "temperature"),
        ({"keep_alive": "soon"}, 422, "a duration such as 5m"),
        ({"format": {"type": "nonsense"}}, 400, "cannot process this request"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "The conversation has"),
        ({"messages": [{"role": "user", "content": "see", "images": ["aGk="]}]}, 422, "images"),
    ],
)
async def test_errors_have_a_message(gateway: Gateway, options: dict[str, Any], status: int, reason: str) -> None:
    body = {"model": TINY, "messages": HELLO, "stream": False, **options}
    response = await gateway.curl("/api/chat", json.dumps(body).encode())
    assert response.status_code == status, response.text
    assert reason in response.json()["error"]


async def test_the_client_raises_a_response_error(gateway: Gateway) -> None:
    with pytest.raises(ollama.ResponseError, match="There is no model 'nobody'") as caught:
        await gateway.chat(model="nobody")
    assert caught.value.status_code == 404


async def test_malformed_json_is_refused(gateway: Gateway) -> None:
    response = await gateway.curl("/api/chat", b"{")
    assert response.status_code == 400
    assert "not valid JSON" in response.json()["error"]


async def test_models_and_the_version_are_listed(gateway: Gateway) -> None:
    assert (await gateway.client.list()).models == []  # there is no registry here
    async with httpx.AsyncClient(base_url=gateway.url, timeout=TIMEOUT) as http:
        assert (await http.get("/api/version")).json()["version"]


async def test_embeddings(gateway: Gateway) -> None:
    write_model(gateway.file, seed=3)
    response = await gateway.client.embed(model=TINY, input=["Is Plex up?", "x" * 5000])
    assert len(response.embeddings) == 2  # the long text is truncated
    assert response.prompt_eval_count is not None
    assert response.prompt_eval_count > 2000
    old = await gateway.client.embeddings(model=TINY, prompt="Is Plex up?")
    assert old.embedding == pytest.approx(response.embeddings[0])
    with pytest.raises(ollama.ResponseError, match="the model allows 2048"):
        await gateway.client.embed(model=TINY, input="x" * 5000, truncate=False)


async def test_a_model_is_shown(gateway: Gateway) -> None:
    write_model(gateway.file, seed=3, layers=3)
    info = await gateway.client.show(TINY)
    assert info.details is not None
    assert (info.details.format, info.details.family, info.details.quantization_level) == (
        "gguf",
        "llama",
        "Q8_0",
    )
    assert info.modelinfo is not None
    assert info.modelinfo["llama.block_count"] == 3
    tensors = GGUFReader(gateway.file).tensors
    assert info.modelinfo["general.parameter_count"] == sum(int(tensor.n_elements) for tensor in tensors)
    assert info.capabilities == ["completion", "tools"]
    assert info.template is not None
    assert "<|im_start|>" in info.template
    with pytest.raises(ollama.ResponseError, match="nobody"):
        await gateway.client.show("nobody")
