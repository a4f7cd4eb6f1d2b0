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
SPOKEN = "".join(WORDS)
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


async def test_its_models_are_listed_with_ours(gateway: Gateway) -> None:
    cards = {card.id: card.owned_by for card in (await gateway.openai.models.list()).data}
    assert cards == {"forgearr/tiny": "forgearr", MODEL: "ollama"}
    assert (await gateway.openai.models.retrieve(MODEL)).owned_by == "ollama"
    (tag,) = (await gateway.ollama.list()).models
    assert (tag.model, tag.digest, tag.size) == (MODEL, "0a8c2665", 4683075271)
    shown = await gateway.ollama.show(MODEL)
    assert shown.details is not None
    assert (shown.details.family, shown.details.parameter_size) == ("llama", "8.0B")


async def test_openais_client_is_answered(gateway: Gateway) -> None:
    answer = await gateway.chat(temperature=0.5, max_tokens=300, stop="x", seed=7)
    assert answer.choices[0].message.content == SPOKEN
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (26, 259)
    asked = gateway.server.requests[-1]
    assert asked["messages"] == HELLO
    assert asked["options"] == {"temperature": 0.5, "num_predict": 300, "stop": ["x"], "seed": 7}
    chunks = [chunk async for chunk in await gateway.chat(stream=True, stream_options={"include_usage": True})]
    assert [chunk.choices[0].delta.content for chunk in chunks if chunk.choices] == [*WORDS, None]
    assert chunks[-1].usage.total_tokens == 285
    told = await gateway.openai.completions.create(model=MODEL, prompt="Sonarr")
    assert told.choices[0].text == SPOKEN
    assert gateway.server.requests[-1]["raw"] is True


async def test_ollamas_client_is_answered(gateway: Gateway) -> None:
    chat: Any = gateway.ollama.chat
    answer = await chat(model=MODEL, messages=HELLO, format="json", keep_alive=60)
    assert (answer.message.content, answer.eval_count, answer.load_duration) == (SPOKEN, 259, 6338219291)
    assert gateway.server.requests[-2]["format"] == "json"
    assert gateway.server.requests[-1]["keep_alive"] == 60
    parts = [part async for part in await chat(model=MODEL, messages=HELLO, stream=True)]
    assert "".join(part.message.content for part in parts) == SPOKEN


@pytest.mark.parametrize("stream", [True, False])
async def test_tools_are_called_and_answered(gateway: Gateway, stream: bool) -> None:
    answer = await gateway.chat(tools=[WEATHER], stream=stream)
    if stream:
        chunks = [chunk async for chunk in answer]
        (call,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
    else:
        (call,) = answer.choices[0].message.tool_calls
        reason = answer.choices[0].finish_reason
    assert (call.function.name, call.function.arguments, reason) == ("get_weather", '{"soon":true}', "tool_calls")
    function = {"name": call.function.name, "arguments": call.function.arguments}
    said = {"role": "assistant", "tool_calls": [{"id": call.id, "type": "function", "function": function}]}
    await gateway.chat(messages=[*HELLO, said, {"role": "tool", "tool_call_id": call.id, "content": "rain"}])
    _, called, found = gateway.server.requests[-1]["messages"]
    assert called["tool_calls"] == [{"function": {"name": "get_weather", "arguments": {"soon": True}}}]
    assert (found["tool_name"], found["content"]) == ("get_weather", "rain")


async def test_texts_become_numbers(gateway: Gateway) -> None:
    told = await gateway.openai.embeddings.create(model=MODEL, input=["Is Plex up?"])
    assert told.data[0].embedding == pytest.approx([0.6, 0.8])
    with pytest.raises(openai.BadRequestError, match="exceeds the context length"):
        await gateway.openai.embeddings.create(model=MODEL, input="x" * 2000)


async def test_what_is_refused_and_what_goes_wrong(gateway: Gateway) -> None:
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


async def test_a_server_that_is_away(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_it_answers_while_the_registry_is_away(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "true")
    monkeypatch.setenv("FORGEARR_MLFLOW__TRACKING_URI", "http://127.0.0.1:9")
    get_settings.cache_clear()
    assert (await gateway.chat()).choices[0].message.content == SPOKEN
    with pytest.raises(openai.APIStatusError) as caught:
        await gateway.chat(model="mine")
    assert caught.value.status_code == 503


async def test_it_pulls_for_us(gateway: Gateway) -> None:
    steps = [step async for step in await gateway.ollama.pull("gemma3:1b", stream=True)]
    assert [step.status for step in steps] == ["pulling manifest", "pulling 8eeb52dfb3bb", "success"]
    assert (steps[1].total, steps[1].completed) == (2142590208, 241970)
    assert (await gateway.chat(model="gemma3:1b")).choices[0].message.content == "pulled"
