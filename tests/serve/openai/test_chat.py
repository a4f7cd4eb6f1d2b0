"""The API of models, through the official client, with an engine in this process. Its model always generates the same
text."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from cluster.db import get_database
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
TEXT = "Sonarr watches for new episodes, größer als je zuvor ✓ and hands them to SABnzbd."
CALL = {"name": "get_weather", "arguments": {"soon": True}}
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"soon": {"type": "boolean"}}, "required": ["soon"]},
    },
}


class Gateway:
    """A gateway on a real port, and the engine behind it."""

    def __init__(self, address: str, app: FastAPI, file: Path) -> None:
        self.url = f"http://{address}"
        self.app = app
        self.file = file
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", max_retries=0, api_key="not-needed")
        self.http = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT)

    @property
    def engine(self) -> GgufEngine:
        return self.app.state.engine

    async def chat(self, **options: Any) -> Any:
        create: Any = self.client.chat.completions.create
        return await create(**{"model": TINY, "messages": HELLO, **options})


@pytest.fixture
async def gateway(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    monkeypatch.setenv("FORGEARR_ENGINES__QUEUE", "1")
    get_settings.cache_clear()
    file = write_constant_model(tmp_path / "model.gguf", TEXT)

    async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
        return file

    app = create_app()
    app.state.engine = GgufEngine(get_settings().engines, find_file)
    async with running_app(app) as address:
        gateway = Gateway(address, app, file)
        async with gateway.client, gateway.http:
            yield gateway


async def test_a_completion(gateway: Gateway) -> None:
    completion = await gateway.chat()
    assert completion.choices[0].message.content == TEXT
    assert completion.choices[0].message.tool_calls is None
    assert completion.choices[0].finish_reason == "stop"
    assert (completion.model, completion.object) == (TINY, "chat.completion")
    assert completion.id.startswith("chatcmpl-")
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens > 20


async def test_a_streamed_completion(gateway: Gateway) -> None:
    chunks = [chunk async for chunk in await gateway.chat(stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert len(chunks) > 5
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.model for chunk in chunks} == {TINY}
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.usage for chunk in chunks} == {None}


async def test_a_streamed_completion_with_usage(gateway: Gateway) -> None:
    chunks = [chunk async for chunk in await gateway.chat(stream=True, stream_options={"include_usage": True})]
    *_, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens > 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_bytes_of_a_stream(gateway: Gateway) -> None:
    body = {"model": TINY, "messages": HELLO, "stream": True}
    response = await gateway.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = response.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


async def test_the_synchronous_client(gateway: Gateway) -> None:
    """The synchronous client, in another thread than the server's."""

    def complete_synchronously() -> str | None:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
            return client.chat.completions.create(model=TINY, messages=HELLO).choices[0].message.content

    assert await asyncio.to_thread(complete_synchronously) == TEXT


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_tools_are_called(gateway: Gateway, choice: Any) -> None:
    write_constant_model(gateway.file, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>")
    completion = await gateway.chat(tools=[WEATHER], tool_choice=choice)
    assert completion.choices[0].finish_reason == "tool_calls"
    (call,) = completion.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"soon": True}
    # The next request contains the completion unchanged, and the result of the tool.
    messages = [*HELLO, completion.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert (await gateway.chat(messages=messages, tools=[WEATHER])).choices[0].message.tool_calls


async def test_tools_are_called_in_a_stream(gateway: Gateway) -> None:
    write_constant_model(gateway.file, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>")
    async with gateway.client.chat.completions.stream(model=TINY, messages=HELLO, tools=[WEATHER]) as stream:
        completion = await stream.get_final_completion()
    (call,) = completion.choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"soon": True})
    assert completion.choices[0].finish_reason == "tool_calls"


async def test_options_of_a_completion(gateway: Gateway) -> None:
    completion = await gateway.chat(max_tokens=2)
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 2
    assert (await gateway.chat(max_completion_tokens=1, max_tokens=9)).usage.completion_tokens == 1
    assert (await gateway.chat(stop="new")).choices[0].message.content == TEXT.partition("new")[0]
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert (await gateway.chat(messages=parts, temperature=0, top_p=0.5, seed=-3, n=1, user="ann")).choices
    scored = await gateway.chat(logprobs=True, top_logprobs=2, max_tokens=3)
    assert len(scored.choices[0].logprobs.content) >= 1
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2


async def test_a_completion_follows_a_schema(gateway: Gateway) -> None:
    write_constant_model(gateway.file, '{"ok": true}')
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    completion = await gateway.chat(response_format=response_format)
    assert json.loads(completion.choices[0].message.content) == {"ok": True}


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": 17}, "n"),
        ({"logit_bias": {"one": 3}}, None),
        ({"logit_bias": {"1" * 5000: 3}}, None),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "fool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, None),
        ({"tool_choice": "required"}, None),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_invalid_options_are_refused(gateway: Gateway, wrong: Any, param: str | None, stream: bool) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await gateway.chat(stream=stream, **wrong)
    assert refused.value.type == "invalid_request_error"
    if param:
        assert refused.value.param == param


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_chunk_have_a_status(gateway: Gateway, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await gateway.chat(model="nobody:latest", stream=stream)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await gateway.chat(messages=[{"role": "user", "content": "x" * 5000}], stream=stream)
    assert long.value.code == "context_length_exceeded"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        await gateway.chat(response_format=schema, stream=stream)


async def test_the_progress_of_loading_a_model_is_reported(gateway: Gateway) -> None:
    fetched = asyncio.Event()

    async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
        on_progress(1, 4)
        await fetched.wait()
        return gateway.file

    async def get_models() -> list[dict[str, Any]]:
        return (await gateway.http.get("/api/v1/engines")).json()["models"]

    gateway.app.state.engine = GgufEngine(get_settings().engines, find_file)
    completing = asyncio.create_task(gateway.chat())
    while not (models := await get_models()):
        assert not completing.done()
    (model,) = models
    assert (model["model"], model["phase"], model["progress"]) == (TINY, "fetching", 0.25)
    assert model["seconds"] > 0
    assert model["bytes"] is model["context"] is model["requests"] is None
    fetched.set()
    assert (await completing).choices[0].message.content == TEXT
    (model,) = await get_models()
    assert (model["model"], model["phase"], model["progress"], model["seconds"]) == (TINY, "loaded", 1, None)
    assert (model["bytes"], model["requests"]) == (gateway.engine.loaded_models[0].bytes, 0)


async def test_a_request_beyond_the_queue_is_refused(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    stream = await gateway.chat(stream=True)
    await anext(aiter(stream))
    waiting = asyncio.create_task(gateway.chat(max_tokens=1))
    await eventually_async(lambda: gateway.engine.loaded_models[0].users == 2)
    busy = await gateway.http.post("/v1/chat/completions", json={"model": TINY, "messages": HELLO})
    assert (busy.status_code, busy.headers["Retry-After"]) == (503, "1")
    assert busy.json()["error"]["code"] == "engine_busy"
    await stream.close()  # a disconnected client frees its slot
    assert (await waiting).usage.completion_tokens == 1


async def test_a_disconnected_client_frees_its_slot(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    completing = asyncio.create_task(gateway.chat())
    await eventually_async(lambda: any(held.users for held in gateway.engine.loaded_models))
    completing.cancel()
    assert (await gateway.chat(max_tokens=1)).usage.completion_tokens == 1


async def test_a_damaged_model_is_an_error(gateway: Gateway) -> None:
    gateway.file.write_bytes(b"GGUF nonsense" * 10)
    response = await gateway.http.post("/v1/chat/completions", json={"model": TINY, "messages": HELLO, "stream": True})
    assert (response.status_code, response.json()["error"]["code"]) == (500, "model_unreadable")


async def test_a_query_gets_a_short_response(gateway: Gateway) -> None:
    response = await gateway.http.post("/v1/query", json={"prompt": "Hello", "model": TINY, "temperature": 0.7})
    body = response.json()
    assert body.keys() == {"response", "model", "tokens_used"}
    assert (body["response"], body["model"]) == (TEXT, TINY)
    assert body["tokens_used"] > 20


@pytest.mark.usefixtures("migrated")
async def test_models_are_listed(gateway: Gateway) -> None:
    assert [model.id async for model in gateway.client.models.list()] == [TINY]
    assert (await gateway.client.models.retrieve(TINY)).owned_by == "forgearr"
    with pytest.raises(openai.NotFoundError):
        await gateway.client.models.retrieve("nobody")
    short = (await gateway.http.get("/models")).json()
    assert short == {"models": [], "active_model": None}
    await get_database().close()


async def test_logit_bias_makes_a_token_likelier(gateway: Gateway) -> None:
    """The first 256 tokens of this model are the bytes."""
    write_model(gateway.file, seed=1, talkative=True)
    completion = await gateway.chat(logit_bias={str(ord("Z")): 100}, max_tokens=3)
    assert completion.choices[0].message.content == "ZZZ"


async def test_several_choices(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    options = {"n": 3, "max_tokens": 6, "seed": 5, "temperature": 1}
    completion = await gateway.chat(**options)
    texts = [choice.message.content for choice in completion.choices]
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert completion.usage.completion_tokens == 18
    assert completion.usage.prompt_tokens == (await gateway.chat(max_tokens=1)).usage.prompt_tokens
    streamed = {0: "", 1: "", 2: ""}
    stream = await gateway.chat(**options, stream=True, stream_options={"include_usage": True})
    *chunks, last = [chunk async for chunk in stream]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == texts
    assert last.usage.completion_tokens == 18
    assert last.usage.prompt_tokens == completion.usage.prompt_tokens


async def complete(gateway: Gateway, **options: Any) -> Any:
    """Complete a prompt. The constant model generates its text after a newline."""
    create: Any = gateway.client.completions.create
    return await create(**{"model": TINY, "prompt": "assistant\n", **options})


async def test_a_prompt_is_completed(gateway: Gateway) -> None:
    completion = await complete(gateway, max_tokens=100)
    assert (completion.object, completion.model) == ("text_completion", TINY)
    (choice,) = completion.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (TEXT, "stop", None)
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + completion.usage.completion_tokens
    assert completion.usage.prompt_tokens == len("assistant\n")
    echoed = await complete(gateway, max_tokens=100, echo=True)
    assert echoed.choices[0].text == f"assistant\n{TEXT}"


async def test_several_prompts_are_completed(gateway: Gateway) -> None:
    prompts = ["assistant\n", "user\n", "x\n"]
    completion = await complete(gateway, prompt=prompts, max_tokens=100, echo=True)
    assert [(choice.index, choice.text) for choice in completion.choices] == [
        (index, prompt + TEXT) for index, prompt in enumerate(prompts)
    ]
    assert completion.usage.prompt_tokens == sum(map(len, prompts))
    texts = {0: "", 1: "", 2: ""}
    finish_reasons: list[str] = []
    stream = await complete(
        gateway, prompt=prompts, max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    for chunk in chunks:
        assert chunk.usage is None
        (choice,) = chunk.choices
        texts[choice.index] += choice.text
        finish_reasons += [choice.finish_reason] if choice.finish_reason else []
    assert set(texts.values()) == {TEXT}
    assert finish_reasons == ["stop"] * 3
    assert last.usage.completion_tokens == completion.usage.completion_tokens


async def test_a_suffix_is_supported_by_models_that_fill_gaps(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support suffix"):
        await complete(gateway, prompt="before", suffix="after", max_tokens=100)
    write_constant_model(gateway.file, TEXT, fills_gaps=True)
    await gateway.engine.unload(TINY)
    completion = await complete(gateway, prompt="before", suffix="after", max_tokens=100)
    assert completion.choices[0].text == TEXT
    assert completion.usage.prompt_tokens == len("before" + "after") + 3


async def test_a_grammar_is_obeyed(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    grammar = {"extra_body": {"grammar": 'root ::= ("yes" | "no")'}}
    assert (await gateway.chat(**grammar)).choices[0].message.content in {"yes", "no"}
    assert (await complete(gateway, max_tokens=50, **grammar)).choices[0].text in {"yes", "no"}
    with pytest.raises(openai.BadRequestError):
        await gateway.chat(extra_body={"grammar": "root ::= ("})
    with pytest.raises(openai.UnprocessableEntityError, match="only one of grammar"):
        await gateway.chat(response_format={"type": "json_object"}, **grammar)


async def test_documents_are_reranked(gateway: Gateway) -> None:
    request = {"model": TINY, "query": "Where is the NAS?", "documents": ["In the cellar.", "On the roof.", "Blue."]}
    refused = await gateway.http.post("/v1/rerank", json=request)
    assert refused.status_code == httpx.codes.BAD_REQUEST
    assert "cannot rank texts" in refused.json()["error"]["message"]
    write_model(gateway.file, seed=1, ranks=True)
    await gateway.engine.unload(TINY)
    body = (await gateway.http.post("/v1/rerank", json=request | {"return_documents": True})).json()
    scores = [result["relevance_score"] for result in body["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert [request["documents"][result["index"]] for result in body["results"]] == [
        result["document"] for result in body["results"]
    ]
    assert body["usage"]["total_tokens"] > sum(map(len, request["documents"]))  # each letter is a token of this model
    best = (await gateway.http.post("/v1/rerank", json=request | {"top_n": 1})).json()["results"]
    assert best == [{**body["results"][0], "document": None}]


async def test_a_completion_has_logprobs(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    (choice,) = (await complete(gateway, prompt="Tell me", max_tokens=4, logprobs=2, seed=1)).choices
    logprobs = choice.logprobs
    assert choice.finish_reason == "length"
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) > 0
    assert all(len(top) <= 2 for top in logprobs.top_logprobs)
    assert logprobs.text_offset[0] == 0


@pytest.mark.parametrize(
    "options", [{"suffix": 1}, {"n": 2}, {"prompt": []}, {"prompt": [1, 2]}, {"echo": True, "logprobs": 1}]
)
async def test_invalid_completion_options_are_refused(gateway: Gateway, options: dict[str, Any]) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        await complete(gateway, **options)


async def test_embeddings(gateway: Gateway) -> None:
    write_model(gateway.file, seed=3)
    create: Any = gateway.client.embeddings.create
    # By default the client requests base64, and decodes it.
    packed = await create(model=TINY, input=["Is Plex up?", "Is Plex up?", "Cook rice."])
    plain = await create(model=TINY, input=["Is Plex up?", "Cook rice."], encoding_format="float")
    first, same, other = (row.embedding for row in packed.data)
    assert first == pytest.approx(same)
    assert first != pytest.approx(other, abs=1e-3)
    assert first == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
    assert [row.index for row in packed.data] == [0, 1, 2]
    assert packed.usage.total_tokens > packed.usage.prompt_tokens / 2 > 10
    short = (await create(model=TINY, input="Is Plex up?", dimensions=8)).data[0].embedding
    assert len(short) == 8
    assert sum(value * value for value in short) == pytest.approx(1, abs=1e-3)
    # The same model can also chat.
    assert (await gateway.chat(max_tokens=2)).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("options", "error", "reason"),
    [
        ({"input": []}, openai.UnprocessableEntityError, "input"),
        ({"input": ""}, openai.UnprocessableEntityError, "input"),
        ({"input": "x" * 5000}, openai.BadRequestError, "tokens; the model allows 2048"),
        ({"dimensions": 1000}, openai.BadRequestError, "64 dimensions, not 1000"),
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
    ],
)
async def test_invalid_embedding_requests_are_refused(
    gateway: Gateway, options: dict[str, Any], error: type[openai.APIStatusError], reason: str
) -> None:
    write_model(gateway.file, seed=3)
    create: Any = gateway.client.embeddings.create
    with pytest.raises(error, match=reason):
        await create(**{"model": TINY, "input": "Hello", **options})
