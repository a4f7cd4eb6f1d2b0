"""Feedback: given, seen, learned from once, and when there is enough of it, a reason to retrain."""

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

pytestmark = pytest.mark.both_databases

PATH = "/api/v1/feedback"
LEARN = "/api/training/prompts/from-feedback"
ASKED: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Who tracks series?"},
]
GOOD: dict[str, Any] = {
    "target": "chat_completion",
    "target_id": "chatcmpl-1",
    "rating": "up",
    "model": "homelab:v2",
    "messages": ASKED,
    "answer": "Sonarr does.",
}
BAD: dict[str, Any] = {**GOOD, "target_id": "chatcmpl-2", "rating": "down"}
LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


async def give(api: ApiClient, said: dict[str, Any], username: str = "ada", status: int = 201) -> dict[str, Any]:
    answer = await api.request(username, "POST", PATH, json=said)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_feedback_is_given_seen_changed_and_deleted(api: ApiClient) -> None:
    given = await give(api, {**GOOD, "comment": "Right."})
    assert given["id"].startswith("fb_")
    assert (given["model"], given["comment"], given["prompt_id"]) == ("homelab", "Right.", None)
    assert given["answer"]["content"] == "Sonarr does."
    path = f"{PATH}/{given['id']}"
    kept = {name: value for name, value in given.items() if name != "retrain_job_id"}
    assert (await api.request("ada", "GET", path)).json() == kept

    # A second thought takes the place of the first, and not that of somebody else.
    again = await give(api, {**GOOD, "rating": "down", "correction": "Sonarr tracks series."}, status=200)
    assert (again["id"], again["rating"], again["comment"]) == (given["id"], "down", None)
    other = await give(api, GOOD, "bob")
    assert other["id"] != given["id"]

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
        ({"messages": [*ASKED, {"role": "assistant", "content": "Hi."}]}, "end before the answer"),
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
async def test_what_nothing_could_be_learned_from_is_refused(
    api: ApiClient,
    changes: dict[str, Any],
    reason: str,
) -> None:
    answer = await api.request("ada", "POST", PATH, json={**GOOD, **changes})
    assert answer.status_code == 422
    assert reason in answer.text
    assert (await api.request("ada", "GET", PATH)).json()["total"] == 0


async def test_a_bare_no_needs_no_conversation(api: ApiClient) -> None:
    given = await give(api, {"target": "agent_message", "target_id": "msg_1", "rating": "down"})
    assert (given["messages"], given["model"]) == (None, None)


async def test_each_is_learned_from_once(api: ApiClient) -> None:
    up, down = await give(api, GOOD), await give(api, BAD)
    corrected = await give(api, {**BAD, "target_id": "chatcmpl-3", "correction": "Sonarr tracks series."})
    theirs = await give(api, GOOD, "bob")
    answer = await api.request("ada", "POST", LEARN, json={"ids": [up["id"], down["id"], corrected["id"]]})
    assert answer.status_code == 201
    learned = answer.json()
    assert (learned["created"], learned["left"]) == (2, 0)
    assert learned["skipped"] == [{"id": down["id"], "reason": "the answer was rated down, and there is no correction"}]
    prompts = [
        (await api.request("ada", "GET", f"/api/training/prompts/{one}")).json() for one in learned["prompt_ids"]
    ]
    assert [one["expected_output"] for one in prompts] == ["Sonarr does.", "Sonarr tracks series."]
    for one in prompts:
        assert (one["system_prompt"], one["user_input"]) == ("Be brief.", "Who tracks series?")
        assert (one["category"], one["tags"], one["messages"]) == ("feedback", ["feedback"], None)

    again = (await api.request("ada", "POST", LEARN, json={"ids": [up["id"]]})).json()
    assert again["created"] == 0
    assert again["skipped"][0]["reason"] == f"it is already prompt {learned['prompt_ids'][0]}"
    assert (await api.request("ada", "POST", LEARN, json={"model": "homelab"})).json()["created"] == 0
    refused = await api.request("ada", "POST", PATH, json={**GOOD, "rating": "down"})
    assert (refused.status_code, refused.json()["error_code"]) == (409, "FEEDBACK_LEARNED")

    # What is somebody else's is not there, but for administrators.
    refused = await api.request("ada", "POST", LEARN, json={"ids": [theirs["id"]]})
    assert (refused.status_code, refused.json()["error_code"]) == (404, "FEEDBACK_NOT_FOUND")
    told = {"model": "homelab:latest", "rating": "up", "category": "praise", "tags": ["praised"]}
    (prompt,) = (await api.request("admin", "POST", LEARN, json=told)).json()["prompt_ids"]
    made = (await api.request("admin", "GET", f"/api/training/prompts/{prompt}")).json()
    assert (made["category"], made["tags"], made["created_by"]) == ("praise", ["praised"], "admin")
    assert (await api.request("ada", "POST", LEARN, json={})).status_code == 422


async def test_calls_are_learned_too(api: ApiClient) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "Look once."},
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "nothing"},
        {"role": "user", "content": "Look again."},
    ]
    said: dict[str, Any] = {
        "target": "tool_call",
        "target_id": "call_2",
        "rating": "down",
        "messages": messages,
        "tools": [LOOK],
    }
    given = await give(api, {**said, "correction": {"role": "assistant", "tool_calls": [{**call, "id": "call_2"}]}})
    (prompt,) = (await api.request("ada", "POST", LEARN, json={"ids": [given["id"]]})).json()["prompt_ids"]
    made = (await api.request("ada", "GET", f"/api/training/prompts/{prompt}")).json()
    assert (made["user_input"], made["expected_output"]) == ("Look once.", None)
    assert made["tool_calls"][0]["id"] == "call_2"
    assert [message["role"] for message in made["messages"]] == ["assistant", "tool", "user"]
    assert made["tools"][0]["function"]["name"] == "look"


async def test_a_stored_response_says_itself_what_was_asked(api: ApiClient, database: Database) -> None:
    principal = Principal(id=api.users["ada"].id, name="ada", is_admin=False)
    first = await respond(database, principal, "a", "Sonarr does.", "Who tracks series?", instructions="Be brief.")
    second = await respond(database, principal, "b", "Radarr does.", "And movies?", previous_response_id=first)
    given = await give(api, {"target": "response", "target_id": second, "rating": "up"})
    assert given["model"] == "homelab"
    assert [message["content"] for message in given["messages"]] == [
        "Who tracks series?",
        "Sonarr does.",
        "And movies?",
    ]
    assert given["answer"]["content"] == "Radarr does."
    given = await give(api, {"target": "response", "target_id": first, "rating": "down", "correction": "Sonarr."})
    assert given["messages"][0] == {**given["messages"][0], "role": "system", "content": "Be brief."}
    assert given["correction"]["content"] == "Sonarr."
    for username, known in (("bob", first), ("ada", "resp_none")):
        refused = await api.request(
            username, "POST", PATH, json={"target": "response", "target_id": known, "rating": "up"}
        )
        assert (refused.status_code, refused.json()["error_code"]) == (404, "RESPONSE_NOT_FOUND")


async def test_enough_of_it_retrains(api: ApiClient, database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    async def plan_after(target_id: str, **said: Any) -> Any:
        return (await give(api, {**GOOD, **said, "target_id": target_id}))["retrain_job_id"]

    for number in range(3):
        assert await plan_after(f"before-{number}") is None
    monkeypatch.setenv("FORGEARR_GUARDIAN__MIN_FEEDBACK", "2")
    get_settings.cache_clear()
    assert await plan_after("nothing to learn", rating="down") is None
    plan = await plan_after("fourth")
    job = await api.get_job(plan)
    assert (job["kind"], job["created_by"]) == ("retrain", "feedback:homelab")
    assert (job["spec"]["repository_id"], job["spec"]["feedback"]) == (None, "homelab")
    # One at a time; and of a repository, where the model is made of one.
    assert [await plan_after("fifth"), await plan_after("sixth")] == [None, None]
    await api.update_job(plan, state=State.FAILED)
    async with database.transaction() as session:
        session.add(Repository(id="repo_1", name="handbook", path="/srv/handbook", model="homelab", **REGISTERED))
    assert await plan_after("seventh") is None
    plan = await plan_after("eighth")
    assert (await api.get_job(plan))["spec"].items() >= {"repository_id": "repo_1", "feedback": "homelab"}.items()
    # What is called so is no model of the registry's, and so nobody's to retrain.
    assert [await plan_after(name, model="forgearr/tiny") for name in ("ninth", "tenth")] == [None, None]


REGISTERED: dict[str, Any] = {"training": {}, "policy": {}, "created_by": "test"}


async def respond(database: Database, principal: Principal, letter: str, said: str, asked: str, **wanted: Any) -> str:
    """A response that was answered and kept; returns its id."""
    identifier = "resp_" + 32 * letter
    request = ResponseRequest(model="homelab:latest", input=asked, **wanted)
    telling = ResponseStream(identifier, request.request_fields())
    answered = Message(role="assistant", content=said).to_item()
    telling.end()
    body = {**telling.response, "output": [{"id": f"msg_{32 * letter}0000", **answered}]}
    await response_store.store(database, body, request.items(identifier, {}), principal)
    return identifier
