"""The API of models, through the official client, with an engine in this process. Its model always gives
the same answer."""

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

TINY = "forgearr/tiny"  # the one name that is in no registry
HELLO: Any = [{"role": "user", "content": "Hello"}]
SPOKEN = "Sonarr watches for new episodes, größer als je zuvor ✓ and hands them to SABnzbd."
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

    async def say(self, **options: Any) -> Any:
        create: Any = self.client.chat.completions.create
        return await create(**{"model": TINY, "messages": HELLO, **options})


@pytest.fixture
async def gateway(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    monkeypatch.setenv("FORGEARR_ENGINES__QUEUE", "1")
    get_settings.cache_clear()
    file = write_constant_model(tmp_path / "model.gguf", SPOKEN)

    async def find_file(reference: str, source: Source, tell: OnProgress) -> Path:
        return file

    app = create_app()
    app.state.engine = GgufEngine(get_settings().engines, find_file)
    async with running_app(app) as address:
        gateway = Gateway(address, app, file)
        async with gateway.client, gateway.http:
            yield gateway


async def test_a_whole_answer(gateway: Gateway) -> None:
    answer = await gateway.say()
    assert answer.choices[0].message.content == SPOKEN
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason == "stop"
    assert (answer.model, answer.object) == (TINY, "chat.completion")
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens > 20


async def test_a_streamed_answer(gateway: Gateway) -> None:
    chunks = [chunk async for chunk in await gateway.say(stream=True)]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == SPOKEN
    assert len(chunks) > 5
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {chunk.model for chunk in chunks} == {TINY}
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.usage for chunk in chunks} == {None}


async def test_a_streamed_answer_with_its_usage(gateway: Gateway) -> None:
    chunks = [chunk async for chunk in await gateway.say(stream=True, stream_options={"include_usage": True})]
    *_, last = chunks
    assert last.choices == []
    assert last.usage.completion_tokens > 5
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_the_stream_on_the_wire(gateway: Gateway) -> None:
    body = {"model": TINY, "messages": HELLO, "stream": True}
    answer = await gateway.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, end, rest = answer.text.split("\n\n")
    assert (end, rest) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["object"] == "chat.completion.chunk" for event in events)


async def test_the_client_that_waits(gateway: Gateway) -> None:
    """The one without async, from another thread than the server's."""

    def talk() -> str | None:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
            return client.chat.completions.create(model=TINY, messages=HELLO).choices[0].message.content

    assert await asyncio.to_thread(talk) == SPOKEN


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "get_weather"}}])
async def test_tools_are_called(gateway: Gateway, choice: Any) -> None:
    write_constant_model(gateway.file, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>")
    answer = await gateway.say(tools=[WEATHER], tool_choice=choice)
    assert answer.choices[0].finish_reason == "tool_calls"
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"soon": True}
    # The answer goes back as it came, with what the tool has found.
    told = [*HELLO, answer.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert (await gateway.say(messages=told, tools=[WEATHER])).choices[0].message.tool_calls


async def test_tools_are_called_in_a_stream(gateway: Gateway) -> None:
    write_constant_model(gateway.file, f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>")
    async with gateway.client.chat.completions.stream(model=TINY, messages=HELLO, tools=[WEATHER]) as stream:
        answer = await stream.get_final_completion()
    (call,) = answer.choices[0].message.tool_calls or []
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", {"soon": True})
    assert answer.choices[0].finish_reason == "tool_calls"


async def test_what_can_be_asked_for(gateway: Gateway) -> None:
    answer = await gateway.say(max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 2
    assert (await gateway.say(max_completion_tokens=1, max_tokens=9)).usage.completion_tokens == 1
    assert (await gateway.say(stop="new")).choices[0].message.content == SPOKEN.partition("new")[0]
    parts: Any = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    assert (await gateway.say(messages=parts, temperature=0, top_p=0.5, seed=-3, n=1, user="ann")).choices
    scored = await gateway.say(logprobs=True, top_logprobs=2, max_tokens=3)
    assert len(scored.choices[0].logprobs.content) >= 1
    assert len(scored.choices[0].logprobs.content[0].top_logprobs) == 2


async def test_a_schema(gateway: Gateway) -> None:
    write_constant_model(gateway.file, '{"ok": true}')
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema, "strict": True}}
    answer = await gateway.say(response_format=wanted)
    assert json.loads(answer.choices[0].message.content) == {"ok": True}


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
async def test_what_is_refused(gateway: Gateway, wrong: Any, param: str | None, stream: bool) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await gateway.say(stream=stream, **wrong)
    assert refused.value.type == "invalid_request_error"
    if param:
        assert refused.value.param == param


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_word_have_a_status(gateway: Gateway, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        await gateway.say(model="nobody:latest", stream=stream)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        await gateway.say(messages=[{"role": "user", "content": "x" * 5000}], stream=stream)
    assert long.value.code == "context_length_exceeded"
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}
    with pytest.raises(openai.BadRequestError):
        await gateway.say(response_format=schema, stream=stream)


async def test_how_far_a_model_is_that_is_being_loaded(gateway: Gateway) -> None:
    arrived = asyncio.Event()

    async def find_file(reference: str, source: Source, tell: OnProgress) -> Path:
        tell(1, 4)
        await arrived.wait()
        return gateway.file

    async def look() -> list[dict[str, Any]]:
        return (await gateway.http.get("/api/v1/engines")).json()["models"]

    gateway.app.state.engine = GgufEngine(get_settings().engines, find_file)
    asking = asyncio.create_task(gateway.say())
    while not (found := await look()):
        assert not asking.done()
    (model,) = found
    assert (model["model"], model["phase"], model["progress"]) == (TINY, "fetching", 0.25)
    assert model["seconds"] > 0
    assert model["bytes"] is model["context"] is model["requests"] is None
    arrived.set()
    assert (await asking).choices[0].message.content == SPOKEN
    (model,) = await look()
    assert (model["model"], model["phase"], model["progress"], model["seconds"]) == (TINY, "loaded", 1, None)
    assert (model["bytes"], model["requests"]) == (gateway.engine.loaded_models[0].bytes, 0)


async def test_too_many_at_once(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    stream = await gateway.say(stream=True)
    await anext(aiter(stream))
    waiting = asyncio.create_task(gateway.say(max_tokens=1))
    await eventually_async(lambda: gateway.engine.loaded_models[0].users == 2)
    busy = await gateway.http.post("/v1/chat/completions", json={"model": TINY, "messages": HELLO})
    assert (busy.status_code, busy.headers["Retry-After"]) == (503, "1")
    assert busy.json()["error"]["code"] == "engine_busy"
    await stream.close()  # who goes away makes room
    assert (await waiting).usage.completion_tokens == 1


async def test_who_waits_for_a_whole_answer_and_leaves_makes_room(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    leaving = asyncio.create_task(gateway.say())
    await eventually_async(lambda: any(held.users for held in gateway.engine.loaded_models))
    leaving.cancel()
    assert (await gateway.say(max_tokens=1)).usage.completion_tokens == 1


async def test_a_damaged_model(gateway: Gateway) -> None:
    gateway.file.write_bytes(b"GGUF nonsense" * 10)
    answer = await gateway.http.post("/v1/chat/completions", json={"model": TINY, "messages": HELLO, "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "model_unreadable")


async def test_a_question_in_one_line(gateway: Gateway) -> None:
    answer = await gateway.http.post("/v1/query", json={"prompt": "Hello", "model": TINY, "temperature": 0.7})
    body = answer.json()
    assert body.keys() == {"response", "model", "tokens_used"}
    assert (body["response"], body["model"]) == (SPOKEN, TINY)
    assert body["tokens_used"] > 20


@pytest.mark.usefixtures("migrated")
async def test_which_models_there_are(gateway: Gateway) -> None:
    assert [model.id async for model in gateway.client.models.list()] == [TINY]
    assert (await gateway.client.models.retrieve(TINY)).owned_by == "forgearr"
    with pytest.raises(openai.NotFoundError):
        await gateway.client.models.retrieve("nobody")
    short = (await gateway.http.get("/models")).json()
    assert short == {"models": [], "active_model": None}
    await get_database().close()


async def test_a_token_can_be_made_likelier(gateway: Gateway) -> None:
    """The first tokens of such a model are the bytes."""
    write_model(gateway.file, seed=1, talkative=True)
    answer = await gateway.say(logit_bias={str(ord("Z")): 100}, max_tokens=3)
    assert answer.choices[0].message.content == "ZZZ"


async def test_several_answers(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    wanted = {"n": 3, "max_tokens": 6, "seed": 5, "temperature": 1}
    answer = await gateway.say(**wanted)
    said = [choice.message.content for choice in answer.choices]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len(set(said)) > 1
    assert answer.usage.completion_tokens == 18
    assert answer.usage.prompt_tokens == (await gateway.say(max_tokens=1)).usage.prompt_tokens
    streamed = {0: "", 1: "", 2: ""}
    stream = await gateway.say(**wanted, stream=True, stream_options={"include_usage": True})
    *chunks, last = [chunk async for chunk in stream]
    for chunk in chunks:
        for choice in chunk.choices:
            streamed[choice.index] += choice.delta.content or ""
    assert list(streamed.values()) == said
    assert last.usage.completion_tokens == 18
    assert last.usage.prompt_tokens == answer.usage.prompt_tokens


async def complete(gateway: Gateway, **options: Any) -> Any:
    """The parrot speaks after a line's end."""
    create: Any = gateway.client.completions.create
    return await create(**{"model": TINY, "prompt": "assistant\n", **options})


async def test_a_prompt_is_gone_on_from(gateway: Gateway) -> None:
    answer = await complete(gateway, max_tokens=100)
    assert (answer.object, answer.model) == ("text_completion", TINY)
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.logprobs) == (SPOKEN, "stop", None)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens == len("assistant\n")
    echoed = await complete(gateway, max_tokens=100, echo=True)
    assert echoed.choices[0].text == f"assistant\n{SPOKEN}"


async def test_several_prompts_are_gone_on_from(gateway: Gateway) -> None:
    prompts = ["assistant\n", "user\n", "x\n"]
    answer = await complete(gateway, prompt=prompts, max_tokens=100, echo=True)
    assert [(choice.index, choice.text) for choice in answer.choices] == [
        (index, prompt + SPOKEN) for index, prompt in enumerate(prompts)
    ]
    assert answer.usage.prompt_tokens == sum(map(len, prompts))
    said = {0: "", 1: "", 2: ""}
    ended: list[str] = []
    stream = await complete(
        gateway, prompt=prompts, max_tokens=100, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = [chunk async for chunk in stream]
    for chunk in chunks:
        assert chunk.usage is None
        (choice,) = chunk.choices
        said[choice.index] += choice.text
        ended += [choice.finish_reason] if choice.finish_reason else []
    assert set(said.values()) == {SPOKEN}
    assert ended == ["stop"] * 3
    assert last.usage.completion_tokens == answer.usage.completion_tokens


async def test_a_gap_is_filled(gateway: Gateway) -> None:
    with pytest.raises(openai.BadRequestError, match="does not support suffix"):
        await complete(gateway, prompt="before", suffix="after", max_tokens=100)
    write_constant_model(gateway.file, SPOKEN, fills_gaps=True)
    await gateway.engine.unload(TINY)
    answer = await complete(gateway, prompt="before", suffix="after", max_tokens=100)
    assert answer.choices[0].text == SPOKEN
    assert answer.usage.prompt_tokens == len("before" + "after") + 3


async def test_a_grammar_is_obeyed(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    grammar = {"extra_body": {"grammar": 'root ::= ("yes" | "no")'}}
    assert (await gateway.say(**grammar)).choices[0].message.content in {"yes", "no"}
    assert (await complete(gateway, max_tokens=50, **grammar)).choices[0].text in {"yes", "no"}
    with pytest.raises(openai.BadRequestError):
        await gateway.say(extra_body={"grammar": "root ::= ("})
    with pytest.raises(openai.UnprocessableEntityError, match="only one of grammar"):
        await gateway.say(response_format={"type": "json_object"}, **grammar)


async def test_texts_are_put_in_order(gateway: Gateway) -> None:
    asked = {"model": TINY, "query": "Where is the NAS?", "documents": ["In the cellar.", "On the roof.", "Blue."]}
    refused = await gateway.http.post("/v1/rerank", json=asked)
    assert refused.status_code == httpx.codes.BAD_REQUEST
    assert "cannot rank texts" in refused.json()["error"]["message"]
    write_model(gateway.file, seed=1, ranks=True)
    await gateway.engine.unload(TINY)
    told = (await gateway.http.post("/v1/rerank", json=asked | {"return_documents": True})).json()
    scores = [one["relevance_score"] for one in told["results"]]
    assert scores == sorted(scores, reverse=True)
    assert len(set(scores)) == 3
    assert [asked["documents"][one["index"]] for one in told["results"]] == [one["document"] for one in told["results"]]
    assert told["usage"]["total_tokens"] > sum(map(len, asked["documents"]))  # a letter is a token to this model
    best = (await gateway.http.post("/v1/rerank", json=asked | {"top_n": 1})).json()["results"]
    assert best == [{**told["results"][0], "document": None}]


async def test_how_likely_the_words_of_a_text_were(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True)
    (choice,) = (await complete(gateway, prompt="Tell me", max_tokens=4, logprobs=2, seed=1)).choices
    told = choice.logprobs
    assert choice.finish_reason == "length"
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset) > 0
    assert all(len(top) <= 2 for top in told.top_logprobs)
    assert told.text_offset[0] == 0


@pytest.mark.parametrize(
    "wanted", [{"suffix": 1}, {"n": 2}, {"prompt": []}, {"prompt": [1, 2]}, {"echo": True, "logprobs": 1}]
)
async def test_a_completion_that_cannot_be_had_is_refused(gateway: Gateway, wanted: dict[str, Any]) -> None:
    with pytest.raises(openai.UnprocessableEntityError):
        await complete(gateway, **wanted)


async def test_texts_become_numbers(gateway: Gateway) -> None:
    write_model(gateway.file, seed=3)
    create: Any = gateway.client.embeddings.create
    # The client asks for base64 by itself, and unpacks it.
    packed = await create(model=TINY, input=["Is Plex up?", "Is Plex up?", "Cook rice."])
    plain = await create(model=TINY, input=["Is Plex up?", "Cook rice."], encoding_format="float")
    first, same, other = (one.embedding for one in packed.data)
    assert first == pytest.approx(same)
    assert first != pytest.approx(other, abs=1e-3)
    assert first == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-3)
    assert [one.index for one in packed.data] == [0, 1, 2]
    assert packed.usage.total_tokens > packed.usage.prompt_tokens / 2 > 10
    short = (await create(model=TINY, input="Is Plex up?", dimensions=8)).data[0].embedding
    assert len(short) == 8
    assert sum(value * value for value in short) == pytest.approx(1, abs=1e-3)
    # It can talk, too.
    assert (await gateway.say(max_tokens=2)).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("wanted", "error", "reason"),
    [
        ({"input": []}, openai.UnprocessableEntityError, "input"),
        ({"input": ""}, openai.UnprocessableEntityError, "input"),
        ({"input": "x" * 5000}, openai.BadRequestError, "tokens; the model allows 2048"),
        ({"dimensions": 1000}, openai.BadRequestError, "64 dimensions, not 1000"),
        ({"model": "nobody"}, openai.NotFoundError, "nobody"),
    ],
)
async def test_texts_that_cannot_become_numbers(
    gateway: Gateway, wanted: dict[str, Any], error: type[openai.APIStatusError], reason: str
) -> None:
    write_model(gateway.file, seed=3)
    create: Any = gateway.client.embeddings.create
    with pytest.raises(error, match=reason):
        await create(**{"model": TINY, "input": "Hello", **wanted})
