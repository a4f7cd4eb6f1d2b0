"""Feedback: created, listed, used once as training data, and when there is enough of it, a reason to retrain."""

from typing import Any

import pytest

from cluster.db import Database
from cluster.ownership import Principal
from cluster.settings import get_settings
from jobs.states import State
from pipelines.guardian.repositories import Repository
from serve.openai.responses import store as response_store
from serve.openai.responses.events import ResponseStream
from serve.openai.responses.items import Message
from serve.openai.responses.request import ResponseRequest
from tests.support.api_client import ApiClient

PATH = "/api/v1/feedback"
LEARN = "/api/training/prompts/from-feedback"
CONVERSATION: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who tracks series?"},
]
GOOD: dict[str, Any] = {
    "target": "chat_completion",
    "target_id": "chatcmpl-1",
    "rating": "up",
    "model": "homelab:v2",
    "messages": CONVERSATION,
    "answer": "Sonarr does.",
}
BAD: dict[str, Any] = {**GOOD, "target_id": "chatcmpl-2", "rating": "down"}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


async def create_feedback(
    api: ApiClient, feedback: dict[str, Any], username: str = "ada", status: int = 201
) -> dict[str, Any]:
    response = await api.request(username, "POST", PATH, json=feedback)
    assert response.status_code == status, response.text
    return response.json()


@pytest.mark.both_databases
async def test_feedback_is_created_listed_replaced_and_deleted(api: ApiClient) -> None:
    created = await create_feedback(api, {**GOOD, "comment": "Right."})
    assert created["id"].startswith("fb_")
    assert (created["model"], created["comment"], created["prompt_id"]) == ("homelab", "Right.", None)
    assert created["answer"]["content"] == "Sonarr does."
    path = f"{PATH}/{created['id']}"
    stored = {name: value for name, value in created.items() if name != "retrain_job_id"}
    assert (await api.request("ada", "GET", path)).json() == stored

    # Second feedback on the same target replaces the user's first, and not that of another user.
    again = await create_feedback(api, {**GOOD, "rating": "down", "correction": "Sonarr tracks series."}, status=200)
    assert (again["id"], again["rating"], again["comment"]) == (created["id"], "down", None)
    other = await create_feedback(api, GOOD, "bob")
    assert other["id"] != created["id"]

    for username, count in (("ada", 1), ("bob", 1), ("admin", 2)):
        page = (await api.request(username, "GET", PATH)).json()
        assert (page["total"], len(page["items"])) == (count, count)
    for query, count in (
        ("rating=up", 1),
        ("rating=down", 1),
        ("model=homelab:latest", 2),
        ("model=other", 0),
        ("learned=true", 0),
        ("learned=false", 2),
        ("target=response", 0),
    ):
        assert (await api.request("admin", "GET", f"{PATH}?{query}")).json()["total"] == count, query
    for method in ("GET", "DELETE"):
        refused = await api.request("bob", method, path)
        assert (refused.status_code, refused.json()["error_code"]) == (404, "FEEDBACK_NOT_FOUND")
    assert (await api.request("ada", "DELETE", path)).status_code == 204
    assert (await api.request("ada", "GET", path)).status_code == 404


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"messages": None}, "messages is missing"),
        ({"answer": None}, "answer is missing"),
        ({"messages": None, "rating": "down", "correction": "Sonarr."}, "messages is missing"),
        ({"messages": [{"role": "assistant", "content": "Hi."}]}, "begin with the user's question"),
        ({"messages": [*CONVERSATION, {"role": "assistant", "content": "Hi."}]}, "end before the answer"),
        ({"answer": {"role": "user", "content": "Hi."}}, "the assistant's message, not the user's"),
        ({"answer": "  "}, "answer: must not be empty"),
        (
            {
                "answer": {
                    "role": "assistant",
                    "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
                }
            },
            "'f'",
        ),
        ({"target": "song"}, "target"),
        ({"rating": "sideways"}, "rating"),
        ({"stars": 5}, "stars"),
    ],
)
async def test_unusable_feedback_is_refused(
    api: ApiClient,
    changes: dict[str, Any],
    reason: str,
) -> None:
    response = await api.request("ada", "POST", PATH, json={**GOOD, **changes})
    assert response.status_code == 422
    assert reason in response.text
    assert (await api.request("ada", "GET", PATH)).json()["total"] == 0


async def test_a_rating_of_an_agent_message_needs_no_conversation(api: ApiClient) -> None:
    created = await create_feedback(api, {"target": "agent_message", "target_id": "msg_1", "rating": "down"})
    assert (created["messages"], created["model"]) == (None, None)


@pytest.mark.both_databases
async def test_feedback_becomes_a_prompt_once(api: ApiClient) -> None:
    up, down = await create_feedback(api, GOOD), await create_feedback(api, BAD)
    corrected = await create_feedback(api, {**BAD, "target_id": "chatcmpl-3", "correction": "Sonarr tracks series."})
    bobs = await create_feedback(api, GOOD, "bob")
    response = await api.request("ada", "POST", LEARN, json={"ids": [up["id"], down["id"], corrected["id"]]})
    assert response.status_code == 201
    learned = response.json()
    assert (learned["created"], learned["left"]) == (2, 0)
    assert learned["skipped"] == [{"id": down["id"], "reason": "the answer was rated down, and there is no correction"}]
    prompts = [
        (await api.request("ada", "GET", f"/api/training/prompts/{prompt_id}")).json()
        for prompt_id in learned["prompt_ids"]
    ]
    assert [prompt["expected_output"] for prompt in prompts] == ["Sonarr does.", "Sonarr tracks series."]
    for prompt in prompts:
        assert (prompt["system_prompt"], prompt["user_input"]) == ("Be brief.", "Who tracks series?")
        assert (prompt["category"], prompt["tags"], prompt["messages"]) == ("feedback", ["feedback"], None)

    again = (await api.request("ada", "POST", LEARN, json={"ids": [up["id"]]})).json()
    assert again["created"] == 0
    assert again["skipped"][0]["reason"] == f"it is already prompt {learned['prompt_ids'][0]}"
    assert (await api.request("ada", "POST", LEARN, json={"model": "homelab"})).json()["created"] == 0
    refused = await api.request("ada", "POST", PATH, json={**GOOD, "rating": "down"})
    assert (refused.status_code, refused.json()["error_code"]) == (409, "FEEDBACK_LEARNED")

    # Feedback of other users is not found, except by administrators.
    refused = await api.request("ada", "POST", LEARN, json={"ids": [bobs["id"]]})
    assert (refused.status_code, refused.json()["error_code"]) == (404, "FEEDBACK_NOT_FOUND")
    filters: dict[str, Any] = {"model": "homelab:latest", "rating": "up", "category": "praise", "tags": ["praised"]}
    filters["all_owners"] = True
    (prompt_id,) = (await api.request("admin", "POST", LEARN, json=filters)).json()["prompt_ids"]
    created = (await api.request("admin", "GET", f"/api/training/prompts/{prompt_id}")).json()
    assert (created["category"], created["tags"], created["created_by"]) == ("praise", ["praised"], "admin")
    assert (await api.request("ada", "POST", LEARN, json={})).status_code == 422


async def test_a_corrected_tool_call_becomes_a_prompt(api: ApiClient) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Look once."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
        {"role": "user", "content": "Look again."},
    ]
    feedback: dict[str, Any] = {
        "target": "tool_call",
        "target_id": "call_2",
        "rating": "down",
        "messages": messages,
        "tools": [LOOK],
    }
    created = await create_feedback(
        api, {**feedback, "correction": {"role": "assistant", "tool_calls": [{**call, "id": "call_2"}]}}
    )
    (prompt,) = (await api.request("ada", "POST", LEARN, json={"ids": [created["id"]]})).json()["prompt_ids"]
    stored_prompt = (await api.request("ada", "GET", f"/api/training/prompts/{prompt}")).json()
    assert (stored_prompt["user_input"], stored_prompt["expected_output"]) == ("Look once.", None)
    assert stored_prompt["tool_calls"][0]["id"] == "call_2"
    assert [message["role"] for message in stored_prompt["messages"]] == ["assistant", "tool", "user"]
    assert stored_prompt["tools"][0]["function"]["name"] == "look"


async def test_feedback_on_a_stored_response_includes_its_conversation(api: ApiClient, database: Database) -> None:
    principal = Principal(id=api.users["ada"].id, name="ada", is_admin=False)
    first = await store_response(
        database, principal, "a", "Sonarr does.", "Who tracks series?", instructions="Be brief."
    )
    second = await store_response(database, principal, "b", "Radarr does.", "And movies?", previous_response_id=first)
    created = await create_feedback(api, {"target": "response", "target_id": second, "rating": "up"})
    assert created["model"] == "homelab"
    assert [message["content"] for message in created["messages"]] == [
        "Who tracks series?",
        "Sonarr does.",
        "And movies?",
    ]
    assert created["answer"]["content"] == "Radarr does."
    created = await create_feedback(
        api, {"target": "response", "target_id": first, "rating": "down", "correction": "Sonarr."}
    )
    assert created["messages"][0] == {**created["messages"][0], "role": "system", "content": "Be brief."}
    assert created["correction"]["content"] == "Sonarr."
    for username, response_id in (("bob", first), ("ada", "resp_none")):
        refused = await api.request(
            username, "POST", PATH, json={"target": "response", "target_id": response_id, "rating": "up"}
        )
        assert (refused.status_code, refused.json()["error_code"]) == (404, "RESPONSE_NOT_FOUND")


async def test_enough_feedback_queues_a_retraining(
    api: ApiClient, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def plan_after(target_id: str, **fields: Any) -> Any:
        return (await create_feedback(api, {**GOOD, **fields, "target_id": target_id}))["retrain_job_id"]

    for number in range(3):
        assert await plan_after(f"before-{number}") is None
    monkeypatch.setenv("FORGEARR_GUARDIAN__MIN_FEEDBACK", "2")
    get_settings.cache_clear()
    assert await plan_after("nothing to learn", rating="down") is None
    plan = await plan_after("fourth")
    job = await api.get_job(plan)
    assert (job["kind"], job["created_by"]) == ("retrain", "feedback:homelab")
    assert (job["spec"]["repository_id"], job["spec"]["feedback"]) == (None, "homelab")
    # One plan at a time. If a repository trains the model, the plan is for that repository.
    assert [await plan_after("fifth"), await plan_after("sixth")] == [None, None]
    await api.update_job(plan, state=State.FAILED)
    async with database.transaction() as session:
        session.add(Repository(id="repo_1", name="handbook", path="/srv/handbook", model="homelab", **REGISTERED))
    assert await plan_after("seventh") is None
    plan = await plan_after("eighth")
    assert (await api.get_job(plan))["spec"].items() >= {"repository_id": "repo_1", "feedback": "homelab"}.items()
    # This name is not in the registry, so it cannot be retrained.
    assert [await plan_after(name, model="forgearr/tiny") for name in ("ninth", "tenth")] == [None, None]


REGISTERED: dict[str, Any] = {"training": {}, "policy": {}, "created_by": "test"}


async def store_response(
    database: Database, principal: Principal, letter: str, output: str, question: str, **options: Any
) -> str:
    """Store a finished response, and return its id."""
    identifier = "resp_" + 32 * letter
    request = ResponseRequest(model="homelab:latest", input=question, **options)
    stream = ResponseStream(identifier, request.request_fields())
    item = Message(role="assistant", content=output).to_item()
    stream.end()
    body = {**stream.response, "output": [{"id": f"msg_{32 * letter}0000", **item}]}
    await response_store.store(database, body, request.items(identifier, {}), principal)
    return identifier
