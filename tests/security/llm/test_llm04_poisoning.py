"""LLM04, data poisoning: what a user writes, to have it learned by a model of an administrator."""

import asyncio
from typing import Any

import pytest

from cluster.settings import get_settings
from pipelines.guardian.feedback import store as feedback_store
from pipelines.training.data import resolution
from pipelines.training.data.prompts import NoMatchingPrompt
from pipelines.training.spec import DataSource, PromptFilter
from tests.support.api_client import ApiClient
from tests.support.run_jobs import run_queued

pytestmark = pytest.mark.both_databases

PROMPTS = "/api/training/prompts"
LEARN = f"{PROMPTS}/from-feedback"


async def create_prompt(api: ApiClient, username: str, output: str) -> int:
    prompt = {"name": "x", "user_input": f"{output}?", "expected_output": output, "tags": ["media"], "category": "tv"}
    response = await api.request(username, "POST", PROMPTS, json=prompt)
    assert response.status_code == 201, response.text
    return response.json()["id"]


async def give_feedback(api: ApiClient, username: str, answer: str) -> str:
    feedback: dict[str, Any] = {
        "target": "chat_completion",
        "target_id": f"chatcmpl-{answer}",
        "rating": "up",
        "model": "house",
        "messages": [{"role": "user", "content": f"{answer}?"}],
        "answer": answer,
    }
    response = await api.request(username, "POST", "/api/v1/feedback", json=feedback)
    assert response.status_code == 201, response.text
    return response.json()["id"]


async def learn(api: ApiClient, username: str, **filters: Any) -> list[str]:
    """The answers of the prompts that an account makes from feedback."""
    learned = (await api.request(username, "POST", LEARN, json=filters)).json()["prompt_ids"]
    found = [(await api.request(username, "GET", f"{PROMPTS}/{prompt_id}")).json() for prompt_id in learned]
    return [prompt["expected_output"] for prompt in found]


async def answers_of(api: ApiClient, dataset_id: str) -> set[str]:
    content = (await api.request("admin", "GET", f"/api/v1/datasets/{dataset_id}/content")).text
    return {answer for answer in ("evil", "good", "better") if f'"{answer}"' in content}


async def train_on(api: ApiClient, username: str, **filters: Any) -> set[str]:
    """The answers that a training of an account would learn."""
    data = DataSource(prompts=PromptFilter(**filters))
    dataset = await asyncio.to_thread(resolution.resolve, data, api.users[username].id)
    return await answers_of(api, dataset.id)


async def gather(api: ApiClient) -> set[str]:
    """The answers that a retraining would learn from feedback."""
    job_id = await api.queue_job("gather_feedback", {"model": "house"}, "admin")
    await run_queued(api.database, "gather_feedback")
    result = (await api.get_job(job_id))["result"]
    return {answer for part in ("train", "held_out") for answer in await answers_of(api, result[part]["dataset"])}


@pytest.mark.parametrize("filters", [{"tags": ["media"]}, {"category": "tv"}], ids=["tag", "category"])
async def test_a_users_prompt_is_not_learned_by_its_tag_or_category(api: ApiClient, filters: dict[str, Any]) -> None:
    evil = await create_prompt(api, "bob", "evil")
    with pytest.raises(NoMatchingPrompt, match="all_owners"):
        await train_on(api, "admin", **filters)
    good = await create_prompt(api, "admin", "good")
    assert await train_on(api, "admin", **filters) == {"good"}
    # Whoever has read it may name it; and a user learns from their own prompts, as before.
    assert await train_on(api, "admin", ids=[evil, good]) == {"good", "evil"}
    assert await train_on(api, "admin", **filters, all_owners=True) == {"good", "evil"}
    assert await train_on(api, "bob", **filters, all_owners=True) == {"evil"}


@pytest.mark.parametrize("filters", [{"model": "house"}, {"rating": "up"}], ids=["model", "rating"])
async def test_a_users_feedback_is_not_learned_by_its_model_or_rating(api: ApiClient, filters: dict[str, Any]) -> None:
    evil = await give_feedback(api, "bob", "evil")
    await give_feedback(api, "admin", "good")
    assert await learn(api, "admin", **filters) == ["good"]
    assert await learn(api, "admin", ids=[evil]) == ["evil"]
    await give_feedback(api, "bob", "better")
    assert await learn(api, "ada", **filters, all_owners=True) == []
    assert await learn(api, "admin", **filters, all_owners=True) == ["better"]


async def test_a_users_feedback_is_not_learned_by_a_retraining(api: ApiClient) -> None:
    evil = await give_feedback(api, "bob", "evil")
    for answer in ("good", "better"):
        await give_feedback(api, "admin", answer)
    # Not even if its author makes a prompt of it first.
    assert await learn(api, "bob", ids=[evil]) == ["evil"]
    async with api.database.read_transaction() as session:
        assert not await feedback_store.has_learned(session, "house")
    assert await gather(api) == {"good", "better"}


async def test_feedback_that_an_administrator_chose_is_learned_by_a_retraining(api: ApiClient) -> None:
    await give_feedback(api, "bob", "evil")
    await give_feedback(api, "admin", "good")
    assert await learn(api, "admin", ids=[await give_feedback(api, "ada", "better")]) == ["better"]
    assert await gather(api) == {"good", "better"}


async def test_everybodys_feedback_is_learned_where_the_operator_says_so(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORGEARR_GUARDIAN__MIN_FEEDBACK", "100")
    get_settings.cache_clear()
    for username, answer in (("bob", "better"), ("admin", "good")):
        await give_feedback(api, username, answer)
    assert await gather(api) == {"good", "better"}
