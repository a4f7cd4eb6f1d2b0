"""Training prompts: edited through the API, and selected by filters for training."""

import json
import tracemalloc
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from cluster.db import Database
from cluster.ownership import LOCAL, Principal
from pipelines.training.data import prompts
from pipelines.training.data.parsing import InvalidSample
from pipelines.training.data.prompts import NoMatchingPrompt, PromptNotFound, PromptRequest
from pipelines.training.spec import PromptFilter
from serve.app import create_app

PATH = "/api/training/prompts"
ALICE = Principal(id="a" * 36, name="alice")
BOB = Principal(id="b" * 36, name="bob")
SEARCH = {
    "type": "function",
    "function": {"name": "search", "parameters": {"type": "object", "z": 1, "a": {"b": None}}},
}
CALL = {"id": "c1", "type": "function", "function": {"name": "search", "arguments": '{"title": "Alien"}'}}
MOVIE = {
    "name": "Movie Request Example",
    "category": "media",
    "system_prompt": "You are a helpful homelab assistant.",
    "user_input": "I want to watch Inception",
    "expected_output": "I'll request Inception for you via Overseerr.",
    "tags": ["movies", "requests"],
}
CONVERSATION = {
    "name": "A call, its result and the answer",
    "user_input": "Do we have Alien?",
    "tools": [SEARCH],
    "messages": [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": '{"found": true}'},
    ],
    "expected_output": "Yes.",
}


def build_request(**changes: Any) -> PromptRequest:
    return PromptRequest.model_validate({**MOVIE, **changes})


@pytest.fixture
async def client(database: Database) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(create_app(), client=("127.0.0.1", 40000))
    async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000", timeout=60) as client:
        yield client


async def test_a_prompt_is_created_read_changed_and_deleted(client: httpx.AsyncClient) -> None:
    created = await client.post(PATH, json=MOVIE)
    assert created.status_code == 201
    prompt = created.json()
    assert isinstance(prompt["id"], int)
    assert {name: prompt[name] for name in MOVIE} == MOVIE
    assert (prompt["tools"], prompt["tool_calls"], prompt["messages"]) == (None, None, None)

    changed = await client.put(f"{PATH}/{prompt['id']}", json={"expected_output": "Done.", "category": None})
    assert changed.status_code == 200
    stored = (await client.get(f"{PATH}/{prompt['id']}")).json()
    assert stored == changed.json()
    assert {name: stored[name] for name in MOVIE} == {**MOVIE, "expected_output": "Done.", "category": None}

    assert (await client.delete(f"{PATH}/{prompt['id']}")).status_code == 204
    response = await client.get(f"{PATH}/{prompt['id']}")
    assert (response.status_code, response.json()["error_code"]) == (404, "PROMPT_NOT_FOUND")
    assert (await client.post(PATH, json=MOVIE)).json()["id"] > prompt["id"], "ids are not given out again"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": ""},
        {"name": None},
        {"user_input": " "},
        {"expected_output": None},
        {"expected_output": "  "},
        {"tags": ["a", 1]},
        {"tags": [""]},
        {"tags": None},
        {"tool_calls": [CALL]},
        {"tools": [{"name": "search"}]},
        {"messages": [{"role": "user"}]},
        {"messages": [{"role": "tool", "tool_call_id": "c1", "content": "{}"}]},
        {"colour": "red"},
    ],
)
async def test_an_invalid_prompt_is_refused(client: httpx.AsyncClient, changes: dict[str, Any]) -> None:
    assert (await client.post(PATH, json={**MOVIE, **changes})).status_code == 422
    prompt = (await client.post(PATH, json=MOVIE)).json()
    refused = await client.put(f"{PATH}/{prompt['id']}", json=changes)
    assert refused.status_code == 422
    assert refused.json()["error_code"] == "VALIDATION_ERROR"
    page = (await client.get(PATH)).json()
    assert page["items"] == [prompt]


async def test_prompts_are_filtered_by_category_tag_and_text(client: httpx.AsyncClient) -> None:
    for name, category, tags in (("One", "media", ["a"]), ("Two", "media", ["a", "b"]), ("50%_Three", None, [])):
        prompt = {**MOVIE, "name": name, "category": category, "tags": tags}
        assert (await client.post(PATH, json=prompt)).status_code == 201

    async def names(**filters: str) -> list[str]:
        page = (await client.get(PATH, params=filters)).json()
        exported = (await client.get(f"{PATH}/export", params=filters)).text.splitlines()
        listed = [prompt["name"] for prompt in page["items"]]
        assert page["total"] == len(listed)
        assert [json.loads(line)["name"] for line in exported] == listed
        return listed

    assert await names() == ["One", "Two", "50%_Three"]
    assert await names(category="media") == ["One", "Two"]
    assert await names(tag="b") == ["Two"]
    assert await names(tag="a", category="media", search="tWO") == ["Two"]
    assert await names(search="%_t") == ["50%_Three"]
    assert await names(search="inception") == ["One", "Two", "50%_Three"]
    assert await names(tag="' OR 1=1") == []
    second = (await client.get(PATH, params={"skip": 1, "limit": 1})).json()
    assert ([prompt["name"] for prompt in second["items"]], second["total"]) == (["Two"], 3)


async def test_an_export_can_be_imported(client: httpx.AsyncClient) -> None:
    sent = [
        MOVIE,
        {**CONVERSATION, "tags": []},
        {**CONVERSATION, "expected_output": "", "tool_calls": [CALL], "tags": []},
    ]
    body = "\ufeff" + "".join(f"{json.dumps(prompt)}\r\n\n" for prompt in sent)
    imported = await client.post(f"{PATH}/import", content=body.encode())
    assert (imported.status_code, imported.json()) == (201, {"imported": 3})
    exported = await client.get(f"{PATH}/export")
    assert exported.headers["content-type"] == "application/x-ndjson"
    assert [json.loads(line) for line in exported.text.splitlines()] == sent
    reimported = await client.post(f"{PATH}/import", content=exported.content)
    assert reimported.json() == {"imported": 3}
    twice = (await client.get(f"{PATH}/export")).content
    assert twice == exported.content * 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "line 2 of the upload is not JSON"),
        ("[]", "line 2 of the upload is not a valid prompt"),
        (json.dumps({**MOVIE, "expected_output": None}), "neither content nor tool_calls"),
        (json.dumps({**MOVIE, "user_input": "a\0b"}), "U+0000"),
        ('{"name": "\\ud800"}', "line 2 of the upload is not JSON"),
        (json.dumps({**MOVIE, "id": 1}), "id: Extra inputs"),
    ],
)
async def test_an_import_with_an_invalid_line_imports_nothing(
    client: httpx.AsyncClient, line: str, reason: str
) -> None:
    body = f"{json.dumps(MOVIE)}\n{line}\n{json.dumps(MOVIE)}"
    refused = await client.post(f"{PATH}/import", content=body)
    assert (refused.status_code, refused.json()["error_code"]) == (400, "INVALID_SAMPLE")
    assert reason in refused.json()["message"]
    assert (await client.get(PATH)).json()["total"] == 0


async def test_an_empty_import_is_refused(client: httpx.AsyncClient) -> None:
    refused = await client.post(f"{PATH}/import", content="\n\n")
    assert (refused.status_code, refused.json()["error_code"]) == (400, "EMPTY_DATA")


@pytest.mark.deep
@pytest.mark.parametrize("database", ["sqlite"], indirect=True)
async def test_a_long_import_takes_little_memory(client: httpx.AsyncClient) -> None:
    """20,000 lines of 1 KB, 20 MB together, of which only a part may be in memory."""
    line = f"{json.dumps({**MOVIE, 'expected_output': 'word ' * 150})}\n".encode()

    async def body() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield line * 1000

    length = {"Content-Length": str(len(line) * 20_000)}
    tracemalloc.start()
    imported = await client.post(f"{PATH}/import", content=body(), headers=length)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert imported.json() == {"imported": 20_000}
    assert (await client.get(PATH, params={"limit": 1, "skip": 19_999})).json()["total"] == 20_000
    assert peak < len(line) * 20_000 / 2, f"{peak / 1e6:.0f} MB"


async def test_the_size_of_an_import_is_limited(client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.training.prompts.MAX_IMPORT_BYTES", 1000)
    refused = await client.post(f"{PATH}/import", content=f"{json.dumps(MOVIE)}\n" * 10)
    assert (refused.status_code, refused.json()["error_code"]) == (413, "BODY_TOO_LARGE")


async def test_prompts_are_selected_for_training(database: Database) -> None:
    async with database.transaction() as session:
        alices = [await prompts.create(session, build_request(tags=tags), ALICE) for tags in (["a"], ["a", "b"], ["c"])]
        bobs = await prompts.create(session, build_request(tags=["a"]), BOB)
    one, two, three = (prompt.id for prompt in alices)

    async def matching_ids(principal: Principal = ALICE, **filters: Any) -> list[int]:
        async with database.read_transaction() as session:
            return await prompts.find_matching_ids(session, PromptFilter(**filters), principal)

    assert await matching_ids(tags=["a"]) == [one, two]
    assert await matching_ids(tags=["b", "c"]) == [two, three]
    assert await matching_ids(tags=["a", "c"], ids=[three, one]) == [one, three]
    assert await matching_ids(category="media") == [one, two, three]
    assert await matching_ids(LOCAL, tags=["a"], all_owners=True) == [one, two, bobs.id]
    with pytest.raises(NoMatchingPrompt, match="No training prompt of yours has any of the tags nothing"):
        await matching_ids(tags=["nothing"])
    with pytest.raises(NoMatchingPrompt, match="the category 'x' and any of the tags a"):
        await matching_ids(category="x", tags=["a"])
    for unknown in (bobs.id, 0, -5, 2**63, 10**30):
        with pytest.raises(PromptNotFound, match=f"There is no prompt {unknown}"):
            await matching_ids(ids=[one, unknown])
    with pytest.raises(PromptNotFound, match="There are no prompts"):
        await matching_ids(ids=list(range(1, 60_000)))


async def test_a_prompt_becomes_a_conversation(database: Database) -> None:
    async with database.transaction() as session:
        for values in (MOVIE, CONVERSATION, {**CONVERSATION, "expected_output": None, "tool_calls": [CALL]}):
            await prompts.create(session, PromptRequest.model_validate(values), LOCAL)
    async with database.read_transaction() as session:
        samples = await prompts.load_samples(session, PromptFilter(ids=[1, 2, 3]), LOCAL)
    movie, conversation, call = (sample.model_dump(exclude_none=True) for sample in samples)
    assert movie == {
        "messages": [
            {"role": "system", "content": MOVIE["system_prompt"]},
            {"role": "user", "content": MOVIE["user_input"]},
            {"role": "assistant", "content": MOVIE["expected_output"]},
        ]
    }
    assert [message["role"] for message in conversation["messages"]] == ["user", "assistant", "tool", "assistant"]
    assert call["messages"][-1] == {"role": "assistant", "tool_calls": [CALL]}
    # The order of a tool's fields matters to models, so the database must keep it.
    assert list(conversation["tools"][0]["function"]["parameters"]) == ["type", "z", "a"]


def test_a_line_is_parsed_as_a_prompt_or_refused() -> None:
    assert prompts.read_line(json.dumps(MOVIE), "line 1") == build_request()
    with pytest.raises(InvalidSample, match="The line 1 is not a valid prompt: name: Field required"):
        prompts.read_line("{}", "line 1")
    with pytest.raises(ValidationError):
        build_request(user_input="")
