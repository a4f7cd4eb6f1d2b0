"""Chat on a whole platform: through Ray Serve and the command line, and after a killed process."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from transformers import AutoTokenizer

from tests.support.platform import Platform
from tests.support.registry_model import register_model
from tests.support.small_models import write_constant_model, write_model

pytestmark = pytest.mark.platform

ENGINE = "ray::ServeReplica:forgearr:gguf"
ANSWER = "I am a model that says only this."
MESSAGES: Any = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def register(home: Path, platform: Platform, tmp_path: Path) -> Callable[..., str]:
    """Registers files as the versions of a new model, of which the first is served, and returns its name."""

    return lambda *files: register_model(platform.mlflow_url, tmp_path, *files)


def test_a_registered_model_is_served(
    platform: Platform, client: openai.OpenAI, register: Callable[..., str], tmp_path: Path
) -> None:
    name = register(
        write_constant_model(tmp_path / "1.gguf", ANSWER),
        write_constant_model(tmp_path / "2.gguf", "I am the second of them."),
    )
    assert ask(client, name) == ask(client, f"{name}:latest") == ask(client, f"{name}:v1") == ANSWER
    assert ask(client, f"{name}:v2") == "I am the second of them."
    with client.chat.completions.create(model=name, messages=MESSAGES, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == ANSWER
    ids = {model.id for model in client.models.list()}
    assert ids >= {f"{name}:latest", f"{name}:v1", f"{name}:v2", "forgearr/tiny"}
    assert client.models.retrieve(f"{name}:v2").id == f"{name}:v2"
    with pytest.raises(openai.NotFoundError):
        ask(client, f"{name}:v3")
    body = platform.http.get("/models").json()
    (served,) = [model for model in body["models"] if model["name"] == f"{name}:latest"]
    assert served["size"] == (tmp_path / "1.gguf").stat().st_size
    assert body["active_model"] in {model["name"] for model in body["models"]}


def test_chat_on_the_command_line(platform: Platform, register: Callable[..., str], tmp_path: Path) -> None:
    name = register(write_constant_model(tmp_path / "1.gguf", ANSWER))
    assert platform.cli("chat", name, "Who are you?").stdout == f"{ANSWER}\n"
    missing = platform.cli("chat", "nobody", "Who are you?", check=False)
    assert missing.returncode == 1
    assert "nobody" in missing.stderr
    (row,) = [line for line in platform.cli("models").stdout.splitlines() if line.startswith(name)]
    assert row.split()[1:4] == ["v1", "all", "served"]


def test_the_tiny_model_answers(platform: Platform, client: openai.OpenAI) -> None:
    """The first request builds the model. `prompt_tokens` equals what its tokenizer counts."""
    completion = client.chat.completions.create(model="forgearr/tiny", messages=MESSAGES, max_tokens=8)
    assert completion.usage
    assert 1 <= completion.usage.completion_tokens <= 8
    (folder,) = {path.parent for path in (platform.home / "cache").glob("forgearr-tiny-*/tokenizer.json")}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert completion.usage.prompt_tokens == len(prompt)


def test_a_killed_engine_fails_only_the_current_request(
    platform: Platform, client: openai.OpenAI, register: Callable[..., str], tmp_path: Path
) -> None:
    name = register(write_model(tmp_path / "1.gguf", seed=1, talkative=True, context=262_144))
    with client.chat.completions.create(model=name, messages=MESSAGES, stream=True) as stream:
        chunks = iter(stream)
        assert next(chunks)
        assert platform.kill(ENGINE)
        with pytest.raises(openai.APIError, match="The engine stopped during this request"):
            list(chunks)
    assert client.chat.completions.create(model=name, messages=MESSAGES, max_tokens=2).usage


@pytest.mark.deep
def test_a_served_model_stays_available_without_mlflow(
    platform: Platform, client: openai.OpenAI, register: Callable[..., str], tmp_path: Path
) -> None:
    name = register(write_constant_model(tmp_path / "1.gguf", ANSWER))
    assert ask(client, name) == ANSWER
    suspended = platform.processes(mentions="mlflow")
    assert suspended
    for process in suspended:
        process.suspend()
    try:
        for _ in range(3):
            assert ask(client, name) == ANSWER
    finally:
        for process in suspended:
            process.resume()


def ask(client: openai.OpenAI, model: str) -> str | None:
    return client.chat.completions.create(model=model, messages=MESSAGES, temperature=0).choices[0].message.content
