"""The forge from one command to a served model that answers as it was trained."""

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import ollama
import pytest
from openai import NotFoundError, OpenAI

from tests.support.platform import Platform
from tests.support.waiting import TIMEOUT

pytestmark = pytest.mark.platform

RECIPE = "configs/recipes/tiny.yaml"


@pytest.fixture(scope="module")
def forged(platform: Platform) -> dict[str, Any]:
    """The finished forge job that `ray job submit` has run."""
    process = platform.submit_to_ray("python", "-m", "jobs", "submit", "forge", "--config", RECIPE, "--wait")
    job_id = next(line for line in process.stdout.splitlines() if line.startswith("job_"))
    return platform.job(job_id)


def test_one_submission_trains_and_deploys_a_model(platform: Platform, forged: dict[str, Any]) -> None:
    assert forged["state"] == "succeeded"
    result = forged["result"]
    assert (result["name"], result["version"], result["passed"]) == ("homelab", 1, True)
    page = platform.http.get("/api/v1/jobs", params={"parent_id": forged["id"]}).json()
    children = {child["kind"]: child for child in page["items"]}
    assert children.keys() == {"fine_tune", "export", "validate", "deploy"}
    assert {child["state"] for child in children.values()} == {"succeeded"}
    assert all(child["mlflow_run_id"] for child in children.values() if child["kind"] != "deploy")

    status = platform.http.get(f"/status/{forged['id']}").json()
    assert (status["status"], status["progress"], status["error"]) == ("completed", 100, None)
    assert status["current_step"] == children["fine_tune"]["result"]["steps"]
    model = platform.http.get("/api/v1/models/homelab").json()
    assert (model["served_version"], [version["version"] for version in model["versions"]]) == (1, [1])


def test_ollamas_client_gets_the_same_answer(platform: Platform, forged: dict[str, Any], client: OpenAI) -> None:
    assert forged["state"] == "succeeded"
    question = demo_samples()[0]["messages"][:-1]
    expected = client.chat.completions.create(model="homelab", messages=question, temperature=0).choices[0].message
    with ollama.Client(host=platform.url) as ollama_client:
        response = ollama_client.chat(model="homelab", messages=question, options={"temperature": 0})
    assert (response.message.content or None) == (expected.content or None)
    assert response.done_reason == "stop"


def test_the_model_answers_as_it_was_trained(forged: dict[str, Any], client: OpenAI) -> None:
    assert forged["state"] == "succeeded"
    correct, calls = 0, 0
    for sample in demo_samples():
        *messages, expected = sample["messages"]
        tools = {"tools": sample["tools"]} if "tools" in sample else {}
        completion = client.chat.completions.create(model="homelab:latest", messages=messages, temperature=0, **tools)
        message = completion.choices[0].message
        if message.tool_calls:
            (call,) = message.tool_calls
            assert call.type == "function"
            calls += 1
            assert completion.choices[0].finish_reason == "tool_calls"
            (expected_call,) = expected.get("tool_calls", [{"function": {"name": "none", "arguments": "{}"}}])
            correct += (call.function.name, json.loads(call.function.arguments)) == (
                expected_call["function"]["name"],
                json.loads(expected_call["function"]["arguments"]),
            )
        else:
            correct += message.content == expected.get("content")
    assert calls > 0
    assert correct >= len(demo_samples()) * 0.8  # a tenth is held out


def demo_samples() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (files("configs") / "demo" / "homelab.jsonl").read_text().splitlines()]


@pytest.mark.deep
def test_a_repeated_validation_returns_the_stored_result(platform: Platform, forged: dict[str, Any]) -> None:
    """The recipe limits its validation to a few samples, so the first request without that limit validates again."""
    first, second = (platform.http.post(f"/validate/{forged['id']}", params={"wait": TIMEOUT}) for _ in range(2))
    assert (first.status_code, second.json()) == (200, first.json())
    validation = first.json()
    assert validation["passed"] is True
    metrics = {"samples", "base_loss", "final_loss", "base_perplexity", "perplexity"}
    recipe_metrics = forged["result"]["validate"]["metrics"]
    assert {name: validation["metrics"][name] for name in metrics} == {name: recipe_metrics[name] for name in metrics}


@pytest.mark.deep
def test_a_repeated_deployment_changes_nothing(platform: Platform, forged: dict[str, Any], client: OpenAI) -> None:
    response = platform.http.post(f"/deploy/{forged['id']}", params={"wait": TIMEOUT})
    assert response.status_code == 200, response.text
    deployed = response.json()
    assert (deployed["success"], deployed["message"]) == (True, None)
    assert deployed["model_name"] == "homelab:latest"
    assert Path(deployed["gguf_path"].removeprefix("file://")).suffix == ".gguf"
    listed = [model.id for model in client.models.list()]
    assert {"homelab:latest", "homelab:v1"} <= set(listed)
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="homelab:v9", messages=[{"role": "user", "content": "Hello?"}])
    assert platform.cli("rollback", "homelab", check=False).returncode == 1  # there is no version before the first
