"""The whole way, by the shortest command: a recipe goes in, and a model that has learned it answers."""

import json
import sys
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
    """The forge job that `ray job submit` has run, as it ended."""
    ray = [str(Path(sys.executable).parent / "ray"), "job", "submit", "--address", platform.dashboard_url]
    command = [*ray, "--", "python", "-m", "jobs", "submit", "forge", "--config", RECIPE, "--wait"]
    done = platform.run(command)
    job_id = next(line for line in done.stdout.splitlines() if line.startswith("job_"))
    return platform.job(job_id)


def test_one_submission_goes_from_data_to_a_served_model(platform: Platform, forged: dict[str, Any]) -> None:
    assert forged["state"] == "succeeded"
    result = forged["result"]
    assert (result["name"], result["version"], result["passed"]) == ("homelab", 1, True)
    page = platform.http.get("/api/v1/jobs", params={"parent_id": forged["id"]}).json()
    children = {child["kind"]: child for child in page["items"]}
    assert children.keys() == {"fine_tune", "export", "validate", "deploy"}
    assert {child["state"] for child in children.values()} == {"succeeded"}
    assert all(child["mlflow_run_id"] for child in children.values() if child["kind"] != "deploy")

    told = platform.http.get(f"/status/{forged['id']}").json()
    assert (told["status"], told["progress"], told["error"]) == ("completed", 100, None)
    assert told["current_step"] == children["fine_tune"]["result"]["steps"]
    shown = platform.http.get("/api/v1/models/homelab").json()
    assert (shown["served_version"], [version["version"] for version in shown["versions"]]) == (1, [1])


def test_ollama_s_client_gets_the_same_answer(platform: Platform, forged: dict[str, Any], client: OpenAI) -> None:
    assert forged["state"] == "succeeded"
    question = lessons()[0]["messages"][:-1]
    expected = client.chat.completions.create(model="homelab", messages=question, temperature=0).choices[0].message
    with ollama.Client(host=platform.url) as ollama_client:
        said = ollama_client.chat(model="homelab", messages=question, options={"temperature": 0})
    assert (said.message.content or None) == (expected.content or None)
    assert said.done_reason == "stop"


def test_it_answers_what_it_was_taught(forged: dict[str, Any], client: OpenAI) -> None:
    assert forged["state"] == "succeeded"
    right, calls = 0, 0
    for lesson in lessons():
        *asked, expected = lesson["messages"]
        tools = {"tools": lesson["tools"]} if "tools" in lesson else {}
        answer = client.chat.completions.create(model="homelab:latest", messages=asked, temperature=0, **tools)
        said = answer.choices[0].message
        if said.tool_calls:
            (call,) = said.tool_calls
            assert call.type == "function"
            calls += 1
            assert answer.choices[0].finish_reason == "tool_calls"
            (wanted,) = expected.get("tool_calls", [{"function": {"name": "none", "arguments": "{}"}}])
            right += (call.function.name, json.loads(call.function.arguments)) == (
                wanted["function"]["name"],
                json.loads(wanted["function"]["arguments"]),
            )
        else:
            right += said.content == expected.get("content")
    assert calls > 0
    assert right >= len(lessons()) * 0.8  # a tenth was held out


def lessons() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (files("configs") / "demo" / "homelab.jsonl").read_text().splitlines()]


@pytest.mark.deep
def test_what_was_measured_once_is_answered_from_then_on(platform: Platform, forged: dict[str, Any]) -> None:
    """The recipe has measured it with limits of its own, so the first question without them measures again."""
    first, second = (platform.http.post(f"/validate/{forged['id']}", params={"wait": TIMEOUT}) for _ in range(2))
    assert (first.status_code, second.json()) == (200, first.json())
    checked = first.json()
    assert checked["passed"] is True
    same = {"samples", "base_loss", "final_loss", "base_perplexity", "perplexity"}
    before = forged["result"]["validate"]["metrics"]
    assert {name: checked["metrics"][name] for name in same} == {name: before[name] for name in same}


@pytest.mark.deep
def test_deploying_it_again_changes_nothing(platform: Platform, forged: dict[str, Any], client: OpenAI) -> None:
    answer = platform.http.post(f"/deploy/{forged['id']}", params={"wait": TIMEOUT})
    assert answer.status_code == 200, answer.text
    deployed = answer.json()
    assert (deployed["success"], deployed["message"]) == (True, None)
    assert deployed["model_name"] == "homelab:latest"
    assert Path(deployed["gguf_path"].removeprefix("file://")).suffix == ".gguf"
    listed = [model.id for model in client.models.list()]
    assert {"homelab:latest", "homelab:v1"} <= set(listed)
    with pytest.raises(NotFoundError):
        client.chat.completions.create(model="homelab:v9", messages=[{"role": "user", "content": "Hello?"}])
    assert platform.cli("rollback", "homelab", check=False).returncode == 1  # there is no version before the first
