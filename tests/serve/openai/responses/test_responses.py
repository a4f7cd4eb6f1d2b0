"""/v1/responses, through the official client, on an engine of this process."""

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter
from sqlalchemy import func, select, update

from cluster import identity
from cluster.db import Database, get_database, now
from cluster.settings import EngineSettings, get_settings
from pipelines.training.models.registry import OnProgress
from serve.app import create_app
from serve.engines.gguf.replica import FindFile, GgufEngine
from serve.engines.protocol import Chunk, EngineLost, Source
from serve.openai.responses import routes as responses_routes
from serve.openai.responses import store as response_store
from serve.openai.responses.conversation import to_messages
from serve.openai.responses.store import StoredResponse
from tests.support.app_server import running_app
from tests.support.small_models import write_constant_model, write_model
from tests.support.waiting import TIMEOUT, eventually_async

TINY = "forgearr/tiny"  # the one name that is in no registry
SPOKEN = "Sonarr watches for new episodes, größer als je zuvor ✓ and hands them to SABnzbd."
CALL = {"name": "get_weather", "arguments": {"soon": True}}
CALLED = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"soon": {"type": "boolean"}}, "required": ["soon"]},
    "strict": True,
}


class Gateway:
    """A gateway on a real port, the engine behind it, and what that was asked."""

    def __init__(self, address: str, app: FastAPI, file: Path, database: Database) -> None:
        self.url = f"http://{address}"
        self.app = app
        self.file = file
        self.database = database
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", max_retries=0, api_key="not-needed")
        self.http = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT)

    @property
    def engine(self) -> "Listening":
        return self.app.state.engine

    async def say(self, **options: Any) -> Any:
        create: Any = self.client.responses.create
        return await create(**{"model": TINY, "input": "Hello", **options})

    async def events(self, **options: Any) -> list[Any]:
        return [event async for event in await self.say(stream=True, **options)]

    async def stored(self) -> int:
        async with self.database.read_transaction() as session:
            return await session.scalar(select(func.count()).select_from(StoredResponse)) or 0


class Listening(GgufEngine):
    """The engine, which also remembers its requests; and is lost after so many chunks, if it is told to be."""

    def __init__(self, settings: EngineSettings, find_file: FindFile) -> None:
        super().__init__(settings, find_file)
        self.heard: list[Any] = []
        self.lost_after: int | None = None

    async def chat(self, reference: str, request: Any, source: Source = None) -> AsyncGenerator[list[Chunk]]:
        self.heard.append(request)
        told = 0
        async for chunks in super().chat(reference, request, source):
            yield chunks
            told += 1
            if told == self.lost_after:
                raise EngineLost


@pytest.fixture
async def gateway(migrated: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    database = get_database()
    async with running_gateway(database, tmp_path / "model.gguf", monkeypatch) as gateway:
        yield gateway
    await database.close()


@pytest.fixture
async def each_gateway(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Gateway]:
    """One on SQLite, and one on PostgreSQL."""
    async with running_gateway(database, tmp_path / "model.gguf", monkeypatch) as gateway:
        yield gateway


@asynccontextmanager
async def running_gateway(database: Database, file: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncGenerator[Gateway]:
    monkeypatch.setenv("FORGEARR_MLFLOW__ENABLED", "false")
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    get_settings.cache_clear()
    write_constant_model(file, SPOKEN)

    async def find_file(reference: str, source: Source, tell: OnProgress) -> Path:
        return file

    app = create_app()
    app.state.engine = Listening(get_settings().engines, find_file)
    async with running_app(app) as address:
        gateway = Gateway(address, app, file, database)
        async with gateway.client, gateway.http:
            yield gateway


async def test_a_whole_answer(gateway: Gateway) -> None:
    answer = await gateway.say(instructions="Be brief.", metadata={"room": "attic"}, temperature=0, user="ann")
    assert answer.output_text == SPOKEN
    assert (answer.object, answer.status, answer.model) == ("response", "completed", TINY)
    (item,) = answer.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens > 20
    assert answer.usage.output_tokens_details.reasoning_tokens == 0
    assert (answer.instructions, answer.metadata, answer.temperature) == ("Be brief.", {"room": "attic"}, 0)
    assert (answer.error, answer.incomplete_details, answer.tools) == (None, None, [])
    assert answer.completed_at >= answer.created_at
    assert gateway.engine.heard[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    again = await gateway.say(instructions="Be brief.")
    assert again.usage.input_tokens_details.cached_tokens > 0


async def test_what_is_told_has_the_types_of_the_client(gateway: Gateway) -> None:
    """The client itself takes whatever comes."""
    wanted = {"tools": [WEATHER], "text": {"format": {"type": "json_object"}}}
    for options in ({}, wanted):
        Response.model_validate((await gateway.say(**options)).to_dict(), strict=False)
        for event in await gateway.events(**options):
            TypeAdapter[Any](ResponseStreamEvent).validate_python(event.to_dict())


async def test_a_streamed_answer(gateway: Gateway) -> None:
    events = await gateway.events()
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 5
    assert [kind for kind in kinds if kind != "response.output_text.delta"] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == SPOKEN
    first, *_, part, item, last = events
    assert (first.response.status, first.response.output) == ("in_progress", [])
    assert (part.part.text, item.item.content[0].text, last.response.output_text) == (SPOKEN, SPOKEN, SPOKEN)
    assert last.response.usage.output_tokens > 5
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.item.id}
    assert (await gateway.client.responses.retrieve(first.response.id)) == last.response


async def test_the_stream_on_the_wire(gateway: Gateway) -> None:
    body = {"model": TINY, "input": "Hello", "stream": True}
    answer = await gateway.http.post("/v1/responses", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, rest = answer.text.split("\n\n")
    assert rest == ""
    for event in events:
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


async def test_the_clients_own_helpers(gateway: Gateway) -> None:
    class Reply(BaseModel):
        ok: bool

    write_constant_model(gateway.file, '{"ok": true}')
    parsed = await gateway.client.responses.parse(model=TINY, input="Hello", text_format=Reply)
    assert parsed.output_parsed == Reply(ok=True)
    assert gateway.engine.heard[-1]["response_format"]["json_schema"]["schema"]["required"] == ["ok"]
    async with gateway.client.responses.stream(model=TINY, input="Hello", text_format=Reply) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert ("".join(deltas), final.output_parsed) == ('{"ok": true}', Reply(ok=True))
    # What it has parsed goes back as it came.
    again = await gateway.say(input=[*final.output, {"role": "user", "content": "?"}])
    assert again.status == "completed"


async def test_the_client_that_waits(gateway: Gateway) -> None:
    """The one without async, from another thread than the server's."""

    def talk() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
            whole = client.responses.create(model=TINY, input="Hello").output_text
            with client.responses.stream(model=TINY, input="Hello") as stream:
                return whole, stream.get_final_response().output_text

    assert await asyncio.to_thread(talk) == (SPOKEN, SPOKEN)


@pytest.mark.parametrize(
    "choice",
    [
        "auto",
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
async def test_a_loop_with_tools(gateway: Gateway, choice: Any) -> None:
    write_constant_model(gateway.file, CALLED)
    other = {**WEATHER, "name": "other"}
    answer = await gateway.say(tools=[WEATHER, other], tool_choice=choice)
    (call,) = answer.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments) == {"soon": True}
    shown = [tool["function"]["name"] for tool in gateway.engine.heard[-1]["tools"]]
    assert shown == (["get_weather"] if isinstance(choice, dict) else ["get_weather", "other"])
    # By hand, with everything that was said.
    found: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    told = [{"role": "user", "content": "Hello"}, *answer.output, found]
    assert (await gateway.say(input=told, tools=[WEATHER])).output
    by_hand = gateway.engine.heard[-1]["messages"]
    # And by the server, which remembers.
    assert (await gateway.say(input=[found], previous_response_id=answer.id, tools=[WEATHER])).output
    assert gateway.engine.heard[-1]["messages"] == by_hand
    question, called, result = by_hand
    assert question == {"role": "user", "content": "Hello"}
    assert called["tool_calls"][0]["id"] == result["tool_call_id"] == call.call_id
    assert result == {"role": "tool", "tool_call_id": call.call_id, "content": "rain"}


async def test_calls_in_a_stream(gateway: Gateway) -> None:
    write_constant_model(gateway.file, CALLED)
    events = await gateway.events(tools=[WEATHER])
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]
    arguments = "".join(event.delta for event in events if event.type == "response.function_call_arguments.delta")
    (call,) = events[-1].response.output
    assert json.loads(arguments) == json.loads(call.arguments) == {"soon": True}
    added = next(event for event in events if event.type == "response.output_item.added")
    assert (added.item.name, added.item.call_id, added.item.arguments) == ("get_weather", call.call_id, "")


async def test_thoughts(gateway: Gateway) -> None:
    write_constant_model(gateway.file, "<think>\nWho watches?\n</think>\n\nSonarr does.", thinks=True)
    events = await gateway.events()
    kinds = list(dict.fromkeys(event.type for event in events))
    thought, said = events[-1].response.output
    assert kinds[2:6] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
    ]
    assert (thought.type, thought.content[0].text.strip()) == ("reasoning", "Who watches?")
    assert said.content[0].text == "Sonarr does."
    assert (await gateway.say()).output_text == "Sonarr does."
    await gateway.say(input=[*events[-1].response.output, {"role": "user", "content": "Sure?"}])
    assert gateway.engine.heard[-1]["messages"][0]["reasoning_content"].strip() == "Who watches?"


async def test_an_answer_that_does_not_fit(gateway: Gateway) -> None:
    answer = await gateway.say(max_output_tokens=2)
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.output_tokens, answer.completed_at, answer.output[0].status) == (2, None, "incomplete")
    *_, last = await gateway.events(max_output_tokens=2)
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")


async def test_how_likely_the_words_were(gateway: Gateway) -> None:
    wanted = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 3}
    scored = (await gateway.say(**wanted)).output[0].content[0].logprobs
    assert {len(one.top_logprobs) for one in scored} == {2}
    events = await gateway.events(**wanted)
    told = [one for event in events if event.type == "response.output_text.delta" for one in event.logprobs]
    assert [one.token for one in told] == [one.token for one in scored]


async def test_a_conversation_that_the_server_remembers(each_gateway: Gateway) -> None:
    gateway = each_gateway
    first = await gateway.say(input=[{"role": "developer", "content": "Rules."}, {"role": "user", "content": "One"}])
    second = await gateway.say(input="Two", previous_response_id=first.id, instructions="Be brief.")
    third = await gateway.say(input="Three", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    said = [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": SPOKEN},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": SPOKEN},
        {"role": "user", "content": "Three"},
    ]
    assert gateway.engine.heard[-1]["messages"] == said
    assert gateway.engine.heard[-2]["messages"] == [{"role": "system", "content": "Be brief."}, *said[:4]]
    listed: Any = gateway.client.responses.input_items.list
    given = [item async for item in listed(third.id, order="asc", limit=2)]
    assert [item.content[0].text for item in given] == ["Rules.", "One", SPOKEN, "Two", SPOKEN, "Three"]
    assert len({item.id for item in given}) == 6
    page = await listed(third.id, limit=1)
    assert (page.data[0].content[0].text, page.has_more) == ("Three", True)
    # One item by its name.
    reference: Any = {"type": "item_reference", "id": second.output[0].id}
    await gateway.say(input=[reference, {"role": "user", "content": "Again"}])
    assert gateway.engine.heard[-1]["messages"][0] == {"role": "assistant", "content": SPOKEN}
    # What is deleted takes with it what went on from it.
    await gateway.client.responses.delete(first.id)
    for gone in (first.id, third.id):
        with pytest.raises(openai.NotFoundError) as refused:
            await gateway.say(previous_response_id=gone)
        assert refused.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        await gateway.client.responses.retrieve(first.id)
    assert (await gateway.client.responses.retrieve(third.id)).output_text == SPOKEN


async def test_an_answer_that_nobody_keeps(gateway: Gateway) -> None:
    answer = await gateway.say(store=False)
    assert (answer.store, answer.output_text) == (False, SPOKEN)
    with pytest.raises(openai.NotFoundError) as unknown:
        await gateway.client.responses.retrieve(answer.id)
    assert unknown.value.code == "response_not_found"
    *_, last = await gateway.events(store=False)
    assert last.type == "response.completed"
    assert await gateway.stored() == 0


async def test_a_response_is_told_again(gateway: Gateway) -> None:
    write_constant_model(gateway.file, "<think>\nWho watches?\n</think>\n\nSonarr does.", thinks=True)
    answer = await gateway.say()
    events: Any = [event async for event in await gateway.client.responses.retrieve(answer.id, stream=True)]
    assert events[-1].response == answer
    deltas = [event.delta for event in events if event.type.endswith("_text.delta")]
    assert [delta.strip() for delta in deltas] == ["Who watches?", "Sonarr does."]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with pytest.raises(openai.BadRequestError):
        await gateway.client.responses.retrieve(answer.id, stream=True, starting_after=3)
    with pytest.raises(openai.BadRequestError) as refused:
        await gateway.client.responses.cancel(answer.id)
    assert refused.value.code == "not_in_background"


async def test_a_client_that_goes_away_ends_the_work(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    stream = await gateway.say(stream=True)
    seen = aiter(stream)
    first = await anext(seen)
    while (await anext(seen)).type != "response.output_text.delta":
        pass
    await stream.close()
    await eventually_async(lambda: not any(held.users for held in gateway.engine.loaded_models))

    await asyncio.gather(*responses_routes._save_tasks)  # pyright: ignore[reportPrivateUsage]
    left = (await gateway.http.get(f"/v1/responses/{first.response.id}")).json()
    assert (left["status"], left["output"][0]["status"]) == ("cancelled", "incomplete")
    assert left["output"][0]["content"][0]["text"]


async def test_an_engine_that_is_lost_in_the_middle(gateway: Gateway) -> None:
    gateway.engine.lost_after = 2
    *_, last = await gateway.events()
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert last.response.error.message == EngineLost.__doc__
    assert (await gateway.client.responses.retrieve(last.response.id)) == last.response


async def test_a_response_that_cannot_be_kept_says_so(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(response_store, "store", fail)
    *_, last = await gateway.events()
    assert (last.type, last.code) == ("error", "internal_error")
    with pytest.raises(openai.InternalServerError):
        await gateway.say()


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": "required"}, None),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "other"}}, None),
        (
            {
                "tools": [WEATHER],
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "auto",
                    "tools": [{"type": "function", "name": "other"}],
                },
            },
            None,
        ),
        ({"input": []}, None),
        ({"input": [{"type": "web_search_call", "id": "x", "status": "completed"}]}, None),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, None),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"text": {"format": {"type": "grammar"}}}, None),
        ({"truncation": "auto"}, "truncation"),
        ({"reasoning": {"effort": "high"}}, "reasoning.effort"),
        ({"background": True}, "background"),
        ({"include": ["reasoning.encrypted_content"]}, "include.0"),
        ({"top_logprobs": 2}, None),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"service_tier": "flex"}, "service_tier"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"metadata": {"x": "y" * 513}}, "metadata.x"),
        ({"extra_body": {"seed": 1}}, "seed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_is_refused(gateway: Gateway, wrong: Any, param: str | None, stream: bool) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await gateway.say(stream=stream, **wrong)
    assert refused.value.type == "invalid_request_error"
    if param:
        assert refused.value.param == param
    assert await gateway.stored() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_word_have_a_status(gateway: Gateway, stream: bool) -> None:
    for wrong, code in (
        ({"model": "nobody:latest"}, "model_not_found"),
        ({"previous_response_id": "resp_none"}, "previous_response_not_found"),
        ({"input": [{"id": "msg_none"}]}, "item_not_found"),
    ):
        with pytest.raises(openai.NotFoundError) as unknown:
            await gateway.say(stream=stream, **wrong)
        assert unknown.value.code == code
    with pytest.raises(openai.BadRequestError) as long:
        await gateway.say(input="x" * 5000, stream=stream)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unasked:
        await gateway.say(input=[{"type": "function_call_output", "call_id": "x", "output": "y"}], stream=stream)
    assert unasked.value.code == "call_not_found"
    assert await gateway.stored() == 0


async def test_responses_have_an_owner(each_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = each_gateway
    monkeypatch.setenv("FORGEARR_AUTH__REQUIRED", "true")
    monkeypatch.setenv("FORGEARR_LIMITS__ENABLED", "false")
    get_settings.cache_clear()
    clients: dict[str, openai.AsyncOpenAI] = {}
    async with gateway.database.transaction() as session:
        for name in ("ann", "bob", "root"):
            role = "admin" if name == "root" else "user"
            user = await identity.add_user(
                session, email=f"{name}@example.com", username=name, password_hash="-", role=role
            )
            _, key = await identity.create_key(session, user.id, "test")
            clients[name] = gateway.client.with_options(api_key=key)
    anns = await clients["ann"].responses.create(model=TINY, input="Hello")
    bob = clients["bob"].responses
    item: Any = [{"type": "item_reference", "id": anns.output[0].id}]
    for attempt in (
        lambda: bob.retrieve(anns.id),
        lambda: bob.delete(anns.id),
        lambda: bob.cancel(anns.id),
        lambda: bob.create(model=TINY, input="Hello", previous_response_id=anns.id),
        lambda: bob.create(model=TINY, input=item),
    ):
        with pytest.raises(openai.NotFoundError):
            await attempt()
    with pytest.raises(openai.NotFoundError):
        await bob.input_items.list(anns.id)
    assert (await clients["root"].responses.retrieve(anns.id)) == anns
    assert (await clients["ann"].responses.create(model=TINY, input="Go on", previous_response_id=anns.id)).output
    assert (await clients["ann"].responses.create(model=TINY, input=item)).output


async def test_old_responses_are_removed(each_gateway: Gateway) -> None:
    gateway = each_gateway
    old, young = await gateway.say(), await gateway.say()
    months_ago = now() - timedelta(days=get_settings().serve.response_days + 1)
    async with gateway.database.transaction() as session:
        await session.execute(update(StoredResponse).where(StoredResponse.id == old.id).values(created_at=months_ago))
    assert await response_store.remove_old(gateway.database) == 1
    assert (await gateway.client.responses.retrieve(young.id)) == young
    with pytest.raises(openai.NotFoundError):
        await gateway.client.responses.retrieve(old.id)


def test_what_an_assistant_does_in_one_go_is_one_message() -> None:
    def message(role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"text": text}]}

    def call(number: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}

    thought = {"type": "reasoning", "summary": [], "content": [{"text": "Hm."}]}
    found = {"type": "function_call_output", "call_id": "c1", "output": [{"text": "x"}]}
    items = [message("user", "Q"), thought, message("assistant", "A"), call(1), call(2), found, call(3), thought]
    told = to_messages([*items, message("assistant", "B")])
    assert [(one["role"], one["content"], len(one.get("tool_calls", []))) for one in told] == [
        ("user", "Q", 0),
        ("assistant", "A", 2),
        ("tool", "x", 0),
        ("assistant", "", 1),
        ("assistant", "B", 0),
    ]
    assert [one.get("reasoning_content") for one in told] == [None, "Hm.", None, None, "Hm."]
