"""/v1/responses, through the official client, with an engine in this process."""

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

TINY = "forgearr/tiny"  # the only model that needs no registry
TEXT = "Sonarr watches for new episodes, größer als je zuvor ✓ and hands them to SABnzbd."
CALL = {"name": "get_weather", "arguments": {"soon": True}}
CALL_TEXT = f"<tool_call>\n{json.dumps(CALL)}\n</tool_call>"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"soon": {"type": "boolean"}}, "required": ["soon"]},
    "strict": True,
}


class Gateway:
    """A gateway on a real port, and its engine, which records requests."""

    def __init__(self, address: str, app: FastAPI, file: Path, database: Database) -> None:
        self.url = f"http://{address}"
        self.app = app
        self.file = file
        self.database = database
        self.client = openai.AsyncOpenAI(base_url=f"{self.url}/v1", max_retries=0, api_key="not-needed")
        self.http = httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT)

    @property
    def engine(self) -> "RecordingEngine":
        return self.app.state.engine

    async def create(self, **options: Any) -> Any:
        create: Any = self.client.responses.create
        return await create(**{"model": TINY, "input": "Hello", **options})

    async def events(self, **options: Any) -> list[Any]:
        return [event async for event in await self.create(stream=True, **options)]

    async def stored(self) -> int:
        async with self.database.read_transaction() as session:
            return await session.scalar(select(func.count()).select_from(StoredResponse)) or 0


class RecordingEngine(GgufEngine):
    """An engine that records its requests, and may be lost after its first chunks."""

    def __init__(self, settings: EngineSettings, find_file: FindFile) -> None:
        super().__init__(settings, find_file)
        self.requests: list[Any] = []
        self.is_lost = False

    async def chat(
        self, reference: str, request: Any, source: Source = None, account: str = ""
    ) -> AsyncGenerator[list[Chunk]]:
        self.requests.append(request)
        async for chunks in super().chat(reference, request, source):
            yield chunks
            if self.is_lost:
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
    write_constant_model(file, TEXT)

    async def find_file(reference: str, source: Source, on_progress: OnProgress) -> Path:
        return file

    app = create_app()
    app.state.engine = RecordingEngine(get_settings().engines, find_file)
    async with running_app(app) as address:
        gateway = Gateway(address, app, file, database)
        async with gateway.client, gateway.http:
            yield gateway


async def test_a_response(gateway: Gateway) -> None:
    response = await gateway.create(instructions="Be brief.", metadata={"room": "attic"}, temperature=0, user="ann")
    assert response.output_text == TEXT
    assert (response.object, response.status, response.model) == ("response", "completed", TINY)
    (item,) = response.output
    assert (item.type, item.role, item.status) == ("message", "assistant", "completed")
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens > 20
    assert response.usage.output_tokens_details.reasoning_tokens == 0
    assert (response.instructions, response.metadata, response.temperature) == ("Be brief.", {"room": "attic"}, 0)
    assert (response.error, response.incomplete_details, response.tools) == (None, None, [])
    assert response.completed_at >= response.created_at
    assert gateway.engine.requests[-1]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]
    again = await gateway.create(instructions="Be brief.")
    assert again.usage.input_tokens_details.cached_tokens > 0


async def test_responses_have_the_types_of_the_client(gateway: Gateway) -> None:
    """The client itself validates nothing."""
    with_tools = {"tools": [WEATHER], "text": {"format": {"type": "json_object"}}}
    for options in ({}, with_tools):
        Response.model_validate((await gateway.create(**options)).to_dict(), strict=False)
        for event in await gateway.events(**options):
            TypeAdapter[Any](ResponseStreamEvent).validate_python(event.to_dict())


async def test_a_streamed_response(gateway: Gateway) -> None:
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
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == TEXT
    first, *_, part, item, last = events
    assert (first.response.status, first.response.output) == ("in_progress", [])
    assert (part.part.text, item.item.content[0].text, last.response.output_text) == (TEXT, TEXT, TEXT)
    assert last.response.usage.output_tokens > 5
    assert {event.item_id for event in events if hasattr(event, "item_id")} == {item.item.id}
    assert (await gateway.client.responses.retrieve(first.response.id)) == last.response


async def test_the_bytes_of_a_stream(gateway: Gateway) -> None:
    body = {"model": TINY, "input": "Hello", "stream": True}
    response = await gateway.http.post("/v1/responses", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    for event in events:
        name, data = event.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


async def test_the_helpers_of_the_client(gateway: Gateway) -> None:
    class Reply(BaseModel):
        ok: bool

    write_constant_model(gateway.file, '{"ok": true}')
    parsed = await gateway.client.responses.parse(model=TINY, input="Hello", text_format=Reply)
    assert parsed.output_parsed == Reply(ok=True)
    assert gateway.engine.requests[-1]["response_format"]["json_schema"]["schema"]["required"] == ["ok"]
    async with gateway.client.responses.stream(model=TINY, input="Hello", text_format=Reply) as stream:
        deltas = [event.delta async for event in stream if event.type == "response.output_text.delta"]
        final = await stream.get_final_response()
    assert ("".join(deltas), final.output_parsed) == ('{"ok": true}', Reply(ok=True))
    # The next request contains the parsed output unchanged.
    again = await gateway.create(input=[*final.output, {"role": "user", "content": "?"}])
    assert again.status == "completed"


async def test_the_synchronous_client(gateway: Gateway) -> None:
    """The synchronous client, in another thread than the server's."""

    def create_synchronously() -> tuple[str, str]:
        with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
            text = client.responses.create(model=TINY, input="Hello").output_text
            with client.responses.stream(model=TINY, input="Hello") as stream:
                return text, stream.get_final_response().output_text

    assert await asyncio.to_thread(create_synchronously) == (TEXT, TEXT)


@pytest.mark.parametrize(
    "choice",
    [
        "auto",
        "required",
        {"type": "function", "name": "get_weather"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "get_weather"}]},
    ],
)
async def test_a_conversation_with_tools(gateway: Gateway, choice: Any) -> None:
    write_constant_model(gateway.file, CALL_TEXT)
    other = {**WEATHER, "name": "other"}
    response = await gateway.create(tools=[WEATHER, other], tool_choice=choice)
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert json.loads(call.arguments) == {"soon": True}
    offered = [tool["function"]["name"] for tool in gateway.engine.requests[-1]["tools"]]
    assert offered == (["get_weather"] if isinstance(choice, dict) else ["get_weather", "other"])
    # The client sends the whole conversation.
    output: Any = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    conversation = [{"role": "user", "content": "Hello"}, *response.output, output]
    assert (await gateway.create(input=conversation, tools=[WEATHER])).output
    messages = gateway.engine.requests[-1]["messages"]
    # The server continues the stored conversation.
    assert (await gateway.create(input=[output], previous_response_id=response.id, tools=[WEATHER])).output
    assert gateway.engine.requests[-1]["messages"] == messages
    question, called, result = messages
    assert question == {"role": "user", "content": "Hello"}
    assert called["tool_calls"][0]["id"] == result["tool_call_id"] == call.call_id
    assert result == {"role": "tool", "tool_call_id": call.call_id, "content": "rain"}


async def test_tool_calls_in_a_stream(gateway: Gateway) -> None:
    write_constant_model(gateway.file, CALL_TEXT)
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


async def test_reasoning_is_a_separate_item(gateway: Gateway) -> None:
    write_constant_model(gateway.file, "<think>\nWho watches?\n</think>\n\nSonarr does.", thinks=True)
    events = await gateway.events()
    kinds = list(dict.fromkeys(event.type for event in events))
    thought, message = events[-1].response.output
    assert kinds[2:6] == [
        "response.output_item.added",
        "response.content_part.added",
        "response.reasoning_text.delta",
        "response.reasoning_text.done",
    ]
    assert (thought.type, thought.content[0].text.strip()) == ("reasoning", "Who watches?")
    assert message.content[0].text == "Sonarr does."
    assert (await gateway.create()).output_text == "Sonarr does."
    await gateway.create(input=[*events[-1].response.output, {"role": "user", "content": "Sure?"}])
    assert gateway.engine.requests[-1]["messages"][0]["reasoning_content"].strip() == "Who watches?"


async def test_a_truncated_response_is_incomplete(gateway: Gateway) -> None:
    response = await gateway.create(max_output_tokens=2)
    assert (response.status, response.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (response.usage.output_tokens, response.completed_at, response.output[0].status) == (2, None, "incomplete")
    *_, last = await gateway.events(max_output_tokens=2)
    assert (last.type, last.response.incomplete_details.reason) == ("response.incomplete", "max_output_tokens")


async def test_logprobs_are_included_on_request(gateway: Gateway) -> None:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "max_output_tokens": 3}
    scored = (await gateway.create(**options)).output[0].content[0].logprobs
    assert {len(token.top_logprobs) for token in scored} == {2}
    events = await gateway.events(**options)
    streamed = [token for event in events if event.type == "response.output_text.delta" for token in event.logprobs]
    assert [token.token for token in streamed] == [token.token for token in scored]


async def test_a_stored_conversation_is_continued(each_gateway: Gateway) -> None:
    gateway = each_gateway
    first = await gateway.create(input=[{"role": "developer", "content": "Rules."}, {"role": "user", "content": "One"}])
    second = await gateway.create(input="Two", previous_response_id=first.id, instructions="Be brief.")
    third = await gateway.create(input="Three", previous_response_id=second.id)
    assert third.previous_response_id == second.id
    messages = [
        {"role": "system", "content": "Rules."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "Two"},
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "Three"},
    ]
    assert gateway.engine.requests[-1]["messages"] == messages
    assert gateway.engine.requests[-2]["messages"] == [{"role": "system", "content": "Be brief."}, *messages[:4]]
    list_items: Any = gateway.client.responses.input_items.list
    items = [item async for item in list_items(third.id, order="asc", limit=2)]
    assert [item.content[0].text for item in items] == ["Rules.", "One", TEXT, "Two", TEXT, "Three"]
    assert len({item.id for item in items}) == 6
    page = await list_items(third.id, limit=1)
    assert (page.data[0].content[0].text, page.has_more) == ("Three", True)
    # One item by its id.
    reference: Any = {"type": "item_reference", "id": second.output[0].id}
    await gateway.create(input=[reference, {"role": "user", "content": "Again"}])
    assert gateway.engine.requests[-1]["messages"][0] == {"role": "assistant", "content": TEXT}
    # A deleted response cannot be continued, nor can those that continue it.
    await gateway.client.responses.delete(first.id)
    for response_id in (first.id, third.id):
        with pytest.raises(openai.NotFoundError) as refused:
            await gateway.create(previous_response_id=response_id)
        assert refused.value.code == "previous_response_not_found"
    with pytest.raises(openai.NotFoundError):
        await gateway.client.responses.retrieve(first.id)
    assert (await gateway.client.responses.retrieve(third.id)).output_text == TEXT


async def test_a_response_is_not_stored_without_store(gateway: Gateway) -> None:
    response = await gateway.create(store=False)
    assert (response.store, response.output_text) == (False, TEXT)
    with pytest.raises(openai.NotFoundError) as unknown:
        await gateway.client.responses.retrieve(response.id)
    assert unknown.value.code == "response_not_found"
    *_, last = await gateway.events(store=False)
    assert last.type == "response.completed"
    assert await gateway.stored() == 0


async def test_a_stored_response_is_streamed_again(gateway: Gateway) -> None:
    write_constant_model(gateway.file, "<think>\nWho watches?\n</think>\n\nSonarr does.", thinks=True)
    response = await gateway.create()
    events: Any = [event async for event in await gateway.client.responses.retrieve(response.id, stream=True)]
    assert events[-1].response == response
    deltas = [event.delta for event in events if event.type.endswith("_text.delta")]
    assert [delta.strip() for delta in deltas] == ["Who watches?", "Sonarr does."]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    with pytest.raises(openai.BadRequestError):
        await gateway.client.responses.retrieve(response.id, stream=True, starting_after=3)
    with pytest.raises(openai.BadRequestError) as refused:
        await gateway.client.responses.cancel(response.id)
    assert refused.value.code == "not_in_background"


async def test_a_disconnect_cancels_the_response(gateway: Gateway) -> None:
    write_model(gateway.file, seed=1, talkative=True, context=262_144)
    stream = await gateway.create(stream=True)
    received = aiter(stream)
    first = await anext(received)
    while (await anext(received)).type != "response.output_text.delta":
        pass
    await stream.close()
    await eventually_async(lambda: not any(held.users for held in gateway.engine.loaded_models))

    await asyncio.gather(*responses_routes._save_tasks)  # pyright: ignore[reportPrivateUsage]
    left = (await gateway.http.get(f"/v1/responses/{first.response.id}")).json()
    assert (left["status"], left["output"][0]["status"]) == ("cancelled", "incomplete")
    assert left["output"][0]["content"][0]["text"]


async def test_a_response_fails_when_its_engine_is_lost(gateway: Gateway) -> None:
    gateway.engine.is_lost = True
    *_, last = await gateway.events()
    assert (last.type, last.response.status) == ("response.failed", "failed")
    assert last.response.error.code == "server_error"
    assert last.response.error.message == EngineLost.__doc__
    assert (await gateway.client.responses.retrieve(last.response.id)) == last.response


async def test_a_failure_to_store_a_response_is_an_error(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise ConnectionResetError

    monkeypatch.setattr(response_store, "store", fail)
    *_, last = await gateway.events()
    assert (last.type, last.code) == ("error", "internal_error")
    with pytest.raises(openai.InternalServerError):
        await gateway.create()


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
async def test_invalid_options_are_refused(gateway: Gateway, wrong: Any, param: str | None, stream: bool) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as refused:
        await gateway.create(stream=stream, **wrong)
    assert refused.value.type == "invalid_request_error"
    if param:
        assert refused.value.param == param
    assert await gateway.stored() == 0


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_event_have_a_status(gateway: Gateway, stream: bool) -> None:
    for wrong, code in (
        ({"model": "nobody:latest"}, "model_not_found"),
        ({"previous_response_id": "resp_none"}, "previous_response_not_found"),
        ({"input": [{"id": "msg_none"}]}, "item_not_found"),
    ):
        with pytest.raises(openai.NotFoundError) as unknown:
            await gateway.create(stream=stream, **wrong)
        assert unknown.value.code == code
    with pytest.raises(openai.BadRequestError) as long:
        await gateway.create(input="x" * 5000, stream=stream)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as unasked:
        await gateway.create(input=[{"type": "function_call_output", "call_id": "x", "output": "y"}], stream=stream)
    assert unasked.value.code == "call_not_found"
    assert await gateway.stored() == 0


async def test_responses_belong_to_their_owner(each_gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
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
    old, young = await gateway.create(), await gateway.create()
    months_ago = now() - timedelta(days=get_settings().serve.response_days + 1)
    async with gateway.database.transaction() as session:
        await session.execute(update(StoredResponse).where(StoredResponse.id == old.id).values(created_at=months_ago))
    assert await response_store.remove_old(gateway.database) == 1
    assert (await gateway.client.responses.retrieve(young.id)) == young
    with pytest.raises(openai.NotFoundError):
        await gateway.client.responses.retrieve(old.id)


def test_consecutive_assistant_items_become_one_message() -> None:
    def message(role: str, text: str) -> dict[str, Any]:
        return {"type": "message", "role": role, "content": [{"text": text}]}

    def call(number: int) -> dict[str, Any]:
        return {"type": "function_call", "call_id": f"c{number}", "name": "f", "arguments": "{}"}

    thought = {"type": "reasoning", "summary": [], "content": [{"text": "Hm."}]}
    output = {"type": "function_call_output", "call_id": "c1", "output": [{"text": "x"}]}
    items = [message("user", "Q"), thought, message("assistant", "A"), call(1), call(2), output, call(3), thought]
    messages = to_messages([*items, message("assistant", "B")])
    assert [(entry["role"], entry["content"], len(entry.get("tool_calls", []))) for entry in messages] == [
        ("user", "Q", 0),
        ("assistant", "A", 2),
        ("tool", "x", 0),
        ("assistant", "", 1),
        ("assistant", "B", 0),
    ]
    assert [entry.get("reasoning_content") for entry in messages] == [None, "Hm.", None, None, "Hm."]
