"""The models of a configured Ollama server, through our API and OpenAI's and Ollama's own clients."""

from collections.abc import AsyncIterator
from typing import Any

import ollama
import openai
import pytest

from cluster.db import Database
from cluster.settings import get_settings
from serve.app import create_app
from tests.support.app_server import running_app
from tests.support.services.fake_ollama import FakeOllama, running_fake_ollama

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

MODEL = "qwen3:4b"
HELLO: Any = [{"role": "user", "content": "Hello"}]
WORDS = ["Sonarr ", "knows ", "every ", "episode."]
TEXT = "".join(WORDS)
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"soon": {"type": "boolean"}}}},
}


class Gateway:
    def __init__(self, url: str, server: FakeOllama) -> None:
        self.server = server
        self.openai = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="not-needed", max_retries=0)
        self.ollama = ollama.AsyncClient(host=url)

    async def chat(self, **options: Any) -> Any:
        create: Any = self.openai.chat.completions.create
        return await create(**{"model": MODEL, "messages": HELLO, **options})


@pytest.fixture
async def gateway(database: Database, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    with running_fake_ollama() as server:
        server.installed[MODEL] = WORDS
        monkeypatch.setenv("FORGEARR_OLLAMA__URL", server.url)
        get_settings.cache_clear()
        async with running_app(create_app()) as address:
            gateway = Gateway(f"http://{address}", server)
            async with gateway.openai, gateway.ollama:
                yield gateway


async def test_models_of_the_server_are_listed(gateway: Gateway) -> None:
    cards = {card.id: card.owned_by for card in (await gateway.openai.models.list()).data}
    assert cards == {"forgearr/tiny": "forgearr", MODEL: "ollama"}
    assert (await gateway.openai.models.retrieve(MODEL)).owned_by == "ollama"
    (tag,) = (await gateway.ollama.list()).models
    assert (tag.model, tag.digest, tag.size) == (MODEL, "0a8c2665", 4683075271)
    info = await gateway.ollama.show(MODEL)
    assert info.details is not None
    assert (info.details.family, info.details.parameter_size) == ("llama", "8.0B")


async def test_completions_through_openais_client(gateway: Gateway) -> None:
    completion = await gateway.chat(temperature=0.5, max_tokens=300, stop="x", seed=7)
    assert completion.choices[0].message.content == TEXT
    assert completion.choices[0].finish_reason == "stop"
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens) == (26, 259)
    request = gateway.server.requests[-1]
    assert request["messages"] == HELLO
    assert request["options"] == {"temperature": 0.5, "num_predict": 300, "stop": ["x"], "seed": 7}
    chunks = [chunk async for chunk in await gateway.chat(stream=True, stream_options={"include_usage": True})]
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices] == [*WORDS, None]
    assert chunks[-1].usage.total_tokens == 285
    text_completion = await gateway.openai.completions.create(model=MODEL, prompt="Sonarr")
    assert text_completion.choices[0].text == TEXT
    assert gateway.server.requests[-1]["raw"] is True


async def test_completions_through_ollamas_client(gateway: Gateway) -> None:
    chat: Any = gateway.ollama.chat
    response = await chat(model=MODEL, messages=HELLO, format="json", keep_alive=60)
    assert (response.message.content, response.eval_count, response.load_duration) == (TEXT, 259, 6338219291)
    assert gateway.server.requests[-2]["format"] == "json"
    assert gateway.server.requests[-1]["keep_alive"] == 60
    parts = [part async for part in await chat(model=MODEL, messages=HELLO, stream=True)]
    assert "".join(part.message.content for part in parts) == TEXT


@pytest.mark.parametrize("stream", [True, False])
async def test_tool_calls_and_results_are_passed_on(gateway: Gateway, stream: bool) -> None:
    completion = await gateway.chat(tools=[WEATHER], stream=stream)
    if stream:
        chunks = [chunk async for chunk in completion]
        (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        (call,) = completion.choices[0].message.tool_calls
        reason = completion.choices[0].finish_reason
    assert (call.function.name, call.function.arguments, reason) == ("get_weather", '{"soon":true}', "tool_calls")
    function = {"name": call.function.name, "arguments": call.function.arguments}
    assistant = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]}
    await gateway.chat(messages=[*HELLO, assistant, {"role": "tool", "tool_call_id": call.id, "content": "rain"}])
    _, called, result = gateway.server.requests[-1]["messages"]
    assert called["tool_calls"] == [{"function": {"name": "get_weather", "arguments": {"soon": True}}}]
    assert (result["tool_name"], result["content"]) == ("get_weather", "rain")


async def test_embeddings(gateway: Gateway) -> None:
    response = await gateway.openai.embeddings.create(model=MODEL, input=["Is Plex up?"])
    assert response.data[0].embedding == pytest.approx([0.6, 0.8])
    with pytest.raises(openai.BadRequestError, match="exceeds the context length"):
        await gateway.openai.embeddings.create(model=MODEL, input="x" * 2000)


async def test_refusals_and_errors_of_the_server_are_reported(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError, match="do not support logit_bias"):
        await gateway.chat(logit_bias={"1": 5})
    with pytest.raises(openai.NotFoundError):
        await gateway.chat(model="nobody:7b")
    gateway.server.broken = "llama runner process has terminated"
    with pytest.raises(openai.InternalServerError, match="llama runner process has terminated"):
        await gateway.chat()
    gateway.server.broken = None
    gateway.server.installed.clear()
    with pytest.raises(openai.NotFoundError, match=f"model '{MODEL}' not found"):
        await gateway.chat()


async def test_an_unreachable_server_is_an_error(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    with running_fake_ollama() as server:
        monkeypatch.setenv("FORGEARR_OLLAMA__URL", server.url)
    get_settings.cache_clear()
    async with running_app(create_app()) as address:
        gateway = Gateway(f"http://{address}", server)
        assert [card.id for card in (await gateway.openai.models.list()).data] == ["forgearr/tiny"]
        with pytest.raises(openai.InternalServerError, match="does not answer") as caught:
            await gateway.chat()
        assert caught.value.status_code == 503
        await gateway.openai.close()


async def test_completions_need_no_registry(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "true")
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", "http://127.0.0.1:9")
    get_settings.cache_clear()
    assert (await gateway.chat()).choices[0].message.content == TEXT
    with pytest.raises(openai.APIStatusError) as caught:
        await gateway.chat(model="mine")
    assert caught.value.status_code == 503


async def test_models_are_pulled_by_the_server(gateway: Gateway) -> None:
    steps = [step async for step in await gateway.ollama.pull("gemma3:1b", stream=True)]
    assert [step.status for step in steps] == ["pulling manifest", "pulling 8eeb52dfb3bb", "success"]
    assert (steps[1].total, steps[1].completed) == (2142590208, 241970)
    assert (await gateway.chat(model="gemma3:1b")).choices[0].message.content == "pulled"
