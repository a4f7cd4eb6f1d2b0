"""Talking to models on a whole platform with two engines: through Serve, the command line, and when parts die."""

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
SPOKEN = "I am a model that says only this."
HELLO: Any = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture
def register(home: Path, platform: Platform, tmp_path: Path) -> Callable[..., str]:
    """Put files into the registry as versions of a new model, which serves the first one; returns its name."""

    return lambda *files: register_model(platform.mlflow_url, tmp_path, *files)


def test_a_registered_model_is_served(
    platform: Platform, client: openai.OpenAI, register: Callable[..., str], tmp_path: Path
) -> None:
    name = register(
        write_constant_model(tmp_path / "1.gguf", SPOKEN),
        write_constant_model(tmp_path / "2.gguf", "I am the second of them."),
    )
    assert ask(client, name) == ask(client, f"{name}:latest") == ask(client, f"{name}:v1") == SPOKEN
    assert ask(client, f"{name}:v2") == "I am the second of them."
    with client.chat.completions.create(model=name, messages=HELLO, stream=True) as stream:
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == SPOKEN
    known = {model.id for model in client.models.list()}
    assert known >= {f"{name}:latest", f"{name}:v1", f"{name}:v2", "forgearr/tiny"}
    assert client.models.retrieve(f"{name}:v2").id == f"{name}:v2"
    with pytest.raises(openai.NotFoundError):
        ask(client, f"{name}:v3")
    short = platform.http.get("/models").json()
    (served,) = [model for model in short["models"] if model["name"] == f"{name}:latest"]
    assert served["size"] == (tmp_path / "1.gguf").stat().st_size
    assert short["active_model"] in {model["name"] for model in short["models"]}


def test_the_command_line_talks(platform: Platform, register: Callable[..., str], tmp_path: Path) -> None:
    name = register(write_constant_model(tmp_path / "1.gguf", SPOKEN))
    assert platform.cli("chat", name, "Who are you?").stdout == f"{SPOKEN}\n"
    missing = platform.cli("chat", "nobody", "Who are you?", check=False)
    assert missing.returncode == 1
    assert "nobody" in missing.stderr
    (row,) = [line for line in platform.cli("models").stdout.splitlines() if line.startswith(name)]
    assert row.split()[1:3] == ["v1", "served"]


def test_the_untrained_model_answers(platform: Platform, client: openai.OpenAI) -> None:
    """It is made when somebody asks for it first. What it is said to have read is what its tokenizer counts."""
    answer = client.chat.completions.create(model="forgearr/tiny", messages=HELLO, max_tokens=8)
    assert answer.usage
    assert 1 <= answer.usage.completion_tokens <= 8
    (folder,) = {path.parent for path in (platform.home / "cache").glob("forgearr-tiny-*/tokenizer.json")}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    read = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True, return_dict=False)
    assert answer.usage.prompt_tokens == len(read)


def test_an_engine_that_dies_breaks_off_one_answer(
    platform: Platform, client: openai.OpenAI, register: Callable[..., str], tmp_path: Path
) -> None:
    name = register(write_model(tmp_path / "1.gguf", seed=1, talkative=True, context=262_144))
    with client.chat.completions.create(model=name, messages=HELLO, stream=True) as stream:
        answer = iter(stream)
        assert next(answer)
        assert platform.kill(ENGINE)
        with pytest.raises(openai.APIError, match="The engine stopped during this request"):
            list(answer)
    assert client.chat.completions.create(model=name, messages=HELLO, max_tokens=2).usage


@pytest.mark.deep
def test_what_is_served_is_served_on_without_mlflow(
    platform: Platform, client: openai.OpenAI, register: Callable[..., str], tmp_path: Path
) -> None:
    name = register(write_constant_model(tmp_path / "1.gguf", SPOKEN))
    assert ask(client, name) == SPOKEN
    stopped = platform.processes(mentions="mlflow")
    assert stopped
    for process in stopped:
        process.suspend()
    try:
        for _ in range(3):
            assert ask(client, name) == SPOKEN
    finally:
        for process in stopped:
            process.resume()


def ask(client: openai.OpenAI, model: str) -> str | None:
    return client.chat.completions.create(model=model, messages=HELLO, temperature=0).choices[0].message.content
