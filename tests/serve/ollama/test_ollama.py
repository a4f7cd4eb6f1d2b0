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

TINY = "forgearr/tiny"  # the one name that is in no registry
HELLO: Any = [{"role": "user", "content": "Hello"}]
SPOKEN = "Radarr looks for movies, größer als je zuvor ✓ and sorts them."
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
        """As `curl -d` sends it."""
        headers = {"Content-Type": "application/x-www-form-urlencoded"}
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT) as http:
            return await http.post(path, content=body, headers=headers)


@pytest.fixture
async def gateway(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    get_settings.cache_clear()
    file = write_constant_model(tmp_path / "model.gguf", SPOKEN)

    async def find_file(reference: str, source: Source, tell: OnProgress) -> Path:
        return file

    app = create_app()
    app.state.engine = engine = GgufEngine(get_settings().engines, find_file)
    async with running_app(app) as address:
        gateway = Gateway(f"http://{address}", engine, file)
        async with gateway.client:
            yield gateway


async def test_a_whole_answer(gateway: Gateway) -> None:
    answer = await gateway.chat()
    assert (answer.model, answer.message.role, answer.message.content) == (TINY, "assistant", SPOKEN)
    assert (answer.done, answer.done_reason) == (True, "stop")
    assert answer.prompt_eval_count > 5
    assert answer.eval_count > 5
    assert all(answer[name] > 0 for name in MEASURED)
    assert answer.total_duration > answer.eval_duration


async def test_a_streamed_answer(gateway: Gateway) -> None:
    parts = [part async for part in await gateway.chat(stream=True)]
    assert "".join(part.message.content for part in parts) == SPOKEN
    assert len(parts) > 2
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].eval_count > 5
    assert all(parts[-1][name] > 0 for name in MEASURED)


async def test_a_prompt_is_answered(gateway: Gateway) -> None:
    answer = await gateway.generate(system="Be brief.")
    assert (answer.response, answer.done_reason) == (SPOKEN, "stop")
    parts = [part async for part in await gateway.generate(stream=True)]
    assert "".join(part.response for part in parts) == SPOKEN


async def test_a_raw_prompt_is_gone_on_from_as_it_is(gateway: Gateway) -> None:
    """The parrot speaks after a line's end, which the template adds and a raw prompt has to bring itself."""
    raw = await gateway.generate(prompt="assistant\n", raw=True)
    assert raw.response == SPOKEN
    told = await gateway.generate(prompt="assistant\n")
    assert told.prompt_eval_count > raw.prompt_eval_count
    parts = [part async for part in await gateway.generate(prompt="assistant\n", raw=True, stream=True)]
    assert "".join(part.response for part in parts) == SPOKEN


async def test_the_client_that_waits(gateway: Gateway) -> None:
    """The one without async, from another thread than the server's."""

    def talk() -> str | None:
        with ollama.Client(host=gateway.url) as client:
            return client.chat(model=TINY, messages=HELLO).message.content

    assert await asyncio.to_thread(talk) == SPOKEN


@pytest.mark.parametrize("stream", [True, False])
async def test_tools_are_called_and_answered(gateway: Gateway, stream: bool) -> None:
    write_constant_model(gateway.file, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>")
    answer = await gateway.chat(tools=[WEATHER], stream=stream)
    parts = [part async for part in answer] if stream else [answer]
    (call,) = [call for part in parts for call in part.message.tool_calls or []]
    assert (call.function.name, call.function.arguments) == ("get_weather", {"soon": True})
    assert parts[-1].done_reason == "stop"
    # The answer goes back as it came, with what the tool has found.
    said = next(part.message for part in parts if part.message.tool_calls)
    said.tool_calls[0].function.arguments["since"] = 10**20
    found = {"role": "tool", "tool_name": "get_weather", "content": "rain"}
    assert (await gateway.chat(messages=[*HELLO, said, found], tools=[WEATHER])).message.tool_calls


async def test_options_are_heeded(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    short = await gateway.chat(options={"num_predict": 3, "temperature": 0.5, "seed": 7, "num_ctx": 8192})
    assert (short.eval_count, short.done_reason) == (3, "length")
    again = await gateway.chat(options=ollama.Options(num_predict=3, temperature=0.5, seed=7))
    assert again.message.content == short.message.content
    told = await gateway.chat(options={"num_predict": 4, "temperature": 0}, logprobs=True, top_logprobs=2)
    assert all(len(one.top_logprobs) == 2 and one.logprob <= 0 for one in told.logprobs)


@pytest.mark.parametrize("stream", [True, False])
async def test_the_form_of_an_answer_is_kept(gateway: Gateway, stream: bool) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    schema = {"type": "object", "properties": {"up": {"type": "boolean"}}, "required": ["up"]}
    answer = await gateway.chat(format=schema, options={"num_predict": 60, "temperature": 0}, stream=stream)
    parts = [part async for part in answer] if stream else [answer]
    assert json.loads("".join(part.message.content for part in parts)).keys() == {"up"}


async def test_loaded_and_let_go_by_empty_requests(gateway: Gateway) -> None:
    loaded = await gateway.client.chat(model=TINY, messages=[])
    assert (loaded.done, loaded.done_reason) == (True, "load")
    (running,) = (await gateway.client.ps()).models
    assert running.name == f"{TINY}:latest"
    assert running.size is not None
    assert running.size > 0
    gone = await gateway.client.generate(model=f"{TINY}:latest", prompt="", keep_alive=0)
    assert gone.done_reason == "unload"
    assert (await gateway.client.ps()).models == []


@pytest.mark.parametrize("stream", [True, False])
async def test_a_model_that_need_not_stay_goes(gateway: Gateway, stream: bool) -> None:
    answer = await gateway.chat(keep_alive="0s", stream=stream)
    if stream:
        _ = [part async for part in answer]
    await eventually_async(lambda: gateway.engine.loaded_models == [])
    await gateway.chat(keep_alive="1h30m")
    assert len(gateway.engine.loaded_models) == 1


async def test_a_model_stays_as_long_as_was_said_last(gateway: Gateway) -> None:
    async def leaves_at() -> datetime:
        (running,) = (await gateway.client.ps()).models
        assert running.expires_at is not None
        return running.expires_at

    await gateway.chat(keep_alive="1h30m")
    assert timedelta(minutes=80) < await leaves_at() - now() < timedelta(minutes=90)
    await gateway.client.generate(model=TINY, prompt="", keep_alive=-1)
    assert (await leaves_at()).year > 2300
    await gateway.chat(keep_alive=600)
    assert await leaves_at() - now() < timedelta(minutes=10)
    await gateway.chat()  # whoever says nothing means what the settings say
    assert (await leaves_at()).year > 2300
    await gateway.client.embed(model=TINY, input="Is Plex up?", keep_alive=0.05)
    await eventually_async(lambda: gateway.engine.loaded_models == [])


async def test_models_may_leave_by_themselves(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_ENGINES__KEEP_ALIVE", "50ms")
    get_settings.cache_clear()

    async def find_file(reference: str, source: Source, tell: OnProgress) -> Path:
        return gateway.file

    engine = GgufEngine(get_settings().engines, find_file)
    for _ in range(2):
        answer = await engine.complete(TINY, {"messages": HELLO})
        assert answer["choices"][0]["message"]["content"] == SPOKEN
        await eventually_async(lambda: engine.loaded_models == [])


async def test_who_leaves_frees_the_slot(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    stream = await gateway.chat(stream=True)
    await anext(stream)
    await stream.aclose()
    assert (await gateway.chat(options={"num_predict": 1})).eval_count == 1


async def test_curl_needs_no_content_type(gateway: Gateway) -> None:
    told = await gateway.curl("/api/chat", json.dumps({"model": TINY, "messages": HELLO}).encode())
    assert told.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in told.text.splitlines()]
    assert "".join(line["message"]["content"] for line in lines) == SPOKEN


@pytest.mark.parametrize(
    ("wanted", "status", "reason"),
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
async def test_what_cannot_be_done_is_said_in_a_sentence(
    gateway: Gateway, wanted: dict[str, Any], status: int, reason: str
) -> None:
    body = {"model": TINY, "messages": HELLO, "stream": False, **wanted}
    answer = await gateway.curl("/api/chat", json.dumps(body).encode())
    assert answer.status_code == status, answer.text
    assert reason in answer.json()["error"]


async def test_the_client_raises_its_own_error(gateway: Gateway) -> None:
    with pytest.raises(ollama.ResponseError, match="There is no model 'nobody'") as caught:
        await gateway.chat(model="nobody")
    assert caught.value.status_code == 404


async def test_broken_json(gateway: Gateway) -> None:
    answer = await gateway.curl("/api/chat", b"{")
    assert answer.status_code == 400
    assert "not valid JSON" in answer.json()["error"]


async def test_what_there_is(gateway: Gateway) -> None:
    assert (await gateway.client.list()).models == []  # there is no registry here
    async with httpx.AsyncClient(base_url=gateway.url, timeout=TIMEOUT) as http:
        assert (await http.get("/api/version")).json()["version"]


async def test_texts_become_numbers(gateway: Gateway) -> None:
    write_model(gateway.file, seed=3)
    told = await gateway.client.embed(model=TINY, input=["Is Plex up?", "x" * 5000])
    assert len(told.embeddings) == 2  # what is too long is cut
    assert told.prompt_eval_count is not None
    assert told.prompt_eval_count > 2000
    old = await gateway.client.embeddings(model=TINY, prompt="Is Plex up?")
    assert old.embedding == pytest.approx(told.embeddings[0])
    with pytest.raises(ollama.ResponseError, match="the model allows 2048"):
        await gateway.client.embed(model=TINY, input="x" * 5000, truncate=False)


async def test_what_a_model_is(gateway: Gateway) -> None:
    write_model(gateway.file, seed=3, layers=3)
    shown = await gateway.client.show(TINY)
    assert shown.details is not None
    assert (shown.details.format, shown.details.family, shown.details.quantization_level) == ("gguf", "llama", "Q8_0")
    assert shown.modelinfo is not None
    assert shown.modelinfo["llama.block_count"] == 3
    tensors = GGUFReader(gateway.file).tensors
    assert shown.modelinfo["general.parameter_count"] == sum(int(tensor.n_elements) for tensor in tensors)
    assert shown.capabilities == ["completion", "tools"]
    assert shown.template is not None
    assert "<|im_start|>" in shown.template
    with pytest.raises(ollama.ResponseError, match="nobody"):
        await gateway.client.show("nobody")
