"""Trained models are served before any export, on a whole platform. The engine starts with the first request."""

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.support.platform import Platform, running_platform
from tests.support.waiting import TIMEOUT

pytestmark = [pytest.mark.platform, pytest.mark.deep]

ENGINE = "ray::ServeReplica:forgearr:transformers"
ANSWERS = {"Where does the NAS stand?": "In the cellar.", "Who owns Plex?": "Grandma."}
TOOL_QUESTION: Any = {"role": "user", "content": "Find the movie Inception."}
CALL: Any = {"id": "call_1", "type": "function", "function": {"name": "find", "arguments": '{"title": "Inception"}'}}
TOOL: Any = {"type": "function", "function": {"name": "find", "parameters": {"type": "object", "properties": {}}}}
UNKNOWN = "job_20200101_000000_none"


@pytest.fixture(scope="module")
def platform() -> Iterator[Platform]:
    with running_platform() as platform:
        yield platform


@pytest.fixture(scope="module")
def trained(platform: Platform) -> str:
    """The id of a training that has memorized two answers."""
    lines = [
        json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})
        for question, answer in ANSWERS.items()
    ] + [json.dumps({"messages": [TOOL_QUESTION, {"role": "assistant", "tool_calls": [CALL]}], "tools": [TOOL]})]
    response = platform.http.post("/api/v1/datasets", params={"name": "house"}, content="\n".join(lines * 8))
    assert response.status_code == 201, response.text
    spec = {
        "base_model": "forgearr/tiny",
        "data": {"dataset": response.json()["id"]},
        "epochs": 30,
        "batch_size": 2,
        "learning_rate": 2e-3,
        "rank": 64,
        "pissa": True,
        "eval_split": 0,
    }
    job_id = platform.submit("fine_tune", spec=spec)
    job = platform.wait_for(job_id)
    assert job["state"] == "succeeded", job
    return job_id


def test_a_trained_model_is_served_before_its_export(platform: Platform, trained: str) -> None:
    assert not platform.processes(ENGINE)
    assert platform.http.get("/api/ps").json() == {"models": []}
    assert not platform.processes(ENGINE)  # listing loaded models starts no engine
    with openai.OpenAI(base_url=f"{platform.url}/v1", api_key="not-needed", max_retries=0, timeout=TIMEOUT) as client:
        for question, answer in ANSWERS.items():
            messages: Any = [{"role": "user", "content": question}]
            completion = client.chat.completions.create(model=trained, messages=messages, temperature=0)
            assert completion.choices[0].message.content == answer
            assert completion.choices[0].finish_reason == "stop"
            with client.chat.completions.create(
                model=trained, messages=messages, temperature=0, stream=True, stream_options={"include_usage": True}
            ) as stream:
                chunks = list(stream)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == answer
            assert chunks[-1].usage == completion.usage
        completion = client.chat.completions.create(
            model=trained, messages=[TOOL_QUESTION], tools=[TOOL], temperature=0
        )
        assert completion.choices[0].finish_reason == "tool_calls"
        (call,) = completion.choices[0].message.tool_calls or []
        assert call.to_dict()["function"] == CALL["function"]
        assert client.models.retrieve(trained).id == trained
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model=UNKNOWN, prompt="Hello")
        with pytest.raises(openai.BadRequestError, match="response_format"):
            client.chat.completions.create(
                model=trained,
                messages=[{"role": "user", "content": "Hello"}],
                response_format={"type": "json_object"},
            )
    assert len(platform.processes(ENGINE)) == 1
    (loaded,) = platform.http.get("/api/ps").json()["models"]
    assert loaded["name"] == f"{trained}:latest"
