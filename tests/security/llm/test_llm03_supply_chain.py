"""LLM03, supply chain: what the author of a model wants from the machine that runs it."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from cluster.settings import get_settings
from pipelines.training.models import base_models
from pipelines.training.models.chat_template import ChatTemplateRefused, check_chat_template
from serve.engines.gguf.replica import GgufEngine
from serve.engines.local.engine import EngineStalled
from serve.ollama.create import inspect_gguf
from tests.support.app_server import unload_models
from tests.support.small_models import replace_template, write_model

LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
DOUBLING = "{% set ns = namespace(s='x') %}{% for a in range(40) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}"
LONG = "{% for a in range(99999) %}{{ 'A long line, again and again' }}{% endfor %}"
GUARDED = (
    "{% if messages[0].content == 'boom' %}{% for a in range(100) %}{% for b in range(1000) %}{% endfor %}{% endfor %}"
    "{% endif %}{{ messages[0].content }}"
)
WITH_TOOLS_ONLY = "{{ messages[0].content }}{% if tools %}" + LOOP + "{% endif %}"
ORDINARY = (
    "{% for message in messages %}{% generation %}{{ message.role }}: {{ message.content }}{% endgeneration %}"
    "{% if loop.last %}{% break %}{% endif %}{% endfor %}{{ strftime_now('%Y') }}"
)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        pytest.param(LOOP, "5 s of processor time", id="hang-the-engine"),
        pytest.param(
            WITH_TOOLS_ONLY,
            "5 s of processor time",
            id="hang-the-engine-if-there-are-tools",
            marks=pytest.mark.deep,
        ),
        pytest.param(DOUBLING, "512 MiB of memory", id="fill-the-memory"),
        pytest.param(LONG, "more than 1000000 characters", id="fill-the-context"),
        pytest.param("{% for %}", "not valid Jinja: .*line 1", id="parse-as-something-else"),
        pytest.param("x" * 500_001, "has 500001 characters", id="be-large-itself"),
    ],
)
def test_a_template_that_wants_to(template: str, reason: str) -> None:
    with pytest.raises(ChatTemplateRefused, match=f"The chat template of evil:v1 is refused: .*{reason}"):
        check_chat_template(template, "evil:v1")


@pytest.mark.parametrize("template", [ORDINARY, "{{ raise_exception('Roles must alternate') }}", ""])
def test_ordinary_templates_pass(template: str) -> None:
    check_chat_template(template, "good:v1")


@pytest.mark.parametrize(
    "file", ["chat_template.jinja", "tokenizer_config.json", "additional_chat_templates/rag.jinja"]
)
def test_a_base_model_with_such_a_template_is_refused(home: Path, tmp_path: Path, file: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").touch()
    target = tmp_path / file
    target.parent.mkdir(exist_ok=True)
    described: dict[str, Any] = {
        "chat_template": [{"name": "default", "template": ORDINARY}, {"name": "x", "template": LOOP}]
    }
    target.write_text(json.dumps(described) if target.suffix == ".json" else LOOP)
    with pytest.raises(ChatTemplateRefused, match=str(tmp_path)):
        base_models.resolve(str(tmp_path))


@pytest.mark.parametrize("config", ["no JSON", "[]", '{"chat_template": [{}]}', '{"chat_template": 7}'])
def test_a_base_model_with_a_broken_config_is_refused(home: Path, tmp_path: Path, config: str) -> None:
    for file, content in {"config.json": "{}", "model.safetensors": "", "tokenizer_config.json": config}.items():
        (tmp_path / file).write_text(content)
    with pytest.raises(ChatTemplateRefused, match=f"The chat templates of {tmp_path} cannot be read"):
        base_models.resolve(str(tmp_path))


@pytest.mark.parametrize("field", ["tokenizer.chat_template", "tokenizer.chat_template.tool_use"])
async def test_a_gguf_file_with_such_a_template_is_neither_registered_nor_loaded(
    home: Path, tmp_path: Path, field: str
) -> None:
    file = replace_template(write_model(tmp_path / "model.gguf"), tmp_path / "evil.gguf", LOOP, field)
    with pytest.raises(ChatTemplateRefused, match=r"evil\.gguf"):
        await inspect_gguf(file, file.name, "")

    async def find_file(*_: Any) -> Path:
        return file

    engine = GgufEngine(get_settings().engines, find_file)
    with pytest.raises(ChatTemplateRefused, match="evil:v1"):
        await engine.complete("evil:v1", {"messages": [{"role": "user", "content": "Hello"}]})
    assert await engine.loading() == await engine.loaded() == []


async def test_a_template_that_hangs_on_one_message_has_its_engine_replaced(home: Path, tmp_path: Path) -> None:
    file = replace_template(write_model(tmp_path / "model.gguf"), tmp_path / "evil.gguf", GUARDED)

    async def find_file(*_: Any) -> Path:
        return file

    engine = GgufEngine(get_settings().engines.model_copy(update={"stall_timeout": 0.1}), find_file)

    async def ask(content: str) -> Any:
        return await engine.complete("evil:v1", {"messages": [{"role": "user", "content": content}], "max_tokens": 1})

    await ask("Hello")
    await engine.check_health()
    hanging = asyncio.create_task(ask("boom"))
    with pytest.raises(EngineStalled, match=r"evil:v1 has shown no progress for 0\.1 s"):
        await check_health_during(engine, hanging)
    await hanging
    await engine.check_health()
    await unload_models(engine)


async def check_health_during(engine: GgufEngine, request: asyncio.Task[Any]) -> None:
    while not request.done():
        await engine.check_health()
        await asyncio.sleep(0)
