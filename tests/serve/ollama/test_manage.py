"""Models created, copied, shown and deleted through Ollama's official client, on a real registry and engine."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import ollama
import openai
import pytest
from gguf import GGUFWriter
from sqlalchemy import update

from cluster import storage
from cluster.db import Database, now
from cluster.settings import get_settings
from pipelines.training.models import blob_cleanup, blobs
from pipelines.training.models.blobs import Blob
from pipelines.training.models.versions import ModelNotFound
from serve.app import create_app
from serve.engines.gguf.replica import GgufEngine
from tests.serve.ollama.templates.go_templates import CHAT_TEMPLATE, TURN_TEMPLATE, render
from tests.support.app_server import running_app
from tests.support.registry_model import RegistryModel
from tests.support.small_models import write_adapter, write_constant_model, write_model
from tests.support.waiting import TIMEOUT, eventually_async

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

HELLO: Any = [{"role": "user", "content": "Hello"}]
TEXT = "Sonarr knows every episode of every show that there is."
ECHO = "{% for message in messages %}{{ message.content }}{% endfor %}assistant:"


class Gateway:
    def __init__(
        self, url: str, registry_model: RegistryModel, database: Database, engine: GgufEngine, folder: Path
    ) -> None:
        self.url = url
        self.registry_model = registry_model
        self.database = database
        self.engine = engine
        self.folder = folder
        self.client = ollama.AsyncClient(host=url)

    def write_model(self, text: str = TEXT) -> Path:
        return write_constant_model(self.folder / "constant.gguf", text)

    async def create(self, name: str, path: Path, **fields: Any) -> list[str]:
        """Upload a file and create a model from it; returns the statuses that the server reports."""
        create: Any = self.client.create
        digest = await self.client.create_blob(path)
        return [step.status async for step in await create(name, files={path.name: digest}, stream=True, **fields)]

    async def chat(self, model: str, **options: Any) -> str | None:
        chat: Any = self.client.chat
        return (await chat(model=model, **{"messages": HELLO, **options})).message.content

    async def retire(self, name: str) -> None:
        """Stop serving a model, so that it can be deleted."""
        response = await self.post(f"/api/v1/models/{name}/retire", None)
        assert response.status_code == 200, response.text

    async def post(self, path: str, content: Any, method: str = "POST") -> httpx.Response:
        async with httpx.AsyncClient(base_url=self.url, timeout=TIMEOUT) as http:
            return await http.request(method, path, content=content)


@pytest.fixture
async def gateway(
    database: Database, registry_model: RegistryModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Gateway]:
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    get_settings.cache_clear()
    app = create_app()
    app.state.engine = engine = GgufEngine(get_settings().engines)
    async with running_app(app) as address:
        gateway = Gateway(f"http://{address}", registry_model, database, engine, tmp_path)
        async with gateway.client:
            yield gateway


async def test_a_created_model_can_be_used_at_once(gateway: Gateway) -> None:
    name, path = gateway.registry_model.name, gateway.write_model()
    digest = f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert (await gateway.post(f"/api/blobs/{digest}", None, "HEAD")).status_code == 404
    steps = await gateway.create(name, path)
    assert steps == ["parsing GGUF", f"using existing layer {digest}", "writing manifest", "success"]
    assert (await gateway.post(f"/api/blobs/{digest}", None, "HEAD")).status_code == 200
    assert await gateway.chat(name) == TEXT
    listed = {model.model: model for model in (await gateway.client.list()).models}
    assert listed[f"{name}:latest"].digest == digest.removeprefix("sha256:")
    # The same file makes no new version; another file makes the next one.
    await gateway.create(name, path)
    assert [version.number for version in (await gateway.registry_model.registry.model(name)).versions] == [1]
    write_constant_model(path, "This is the text of the second version.")
    await gateway.create(f"{name}:latest", path)
    assert await gateway.chat(name) == "This is the text of the second version."
    assert await gateway.chat(f"{name}:v1") == TEXT


async def test_the_synchronous_client_gets_one_line(gateway: Gateway) -> None:
    def create() -> str | None:
        with ollama.Client(host=gateway.url) as client:
            digest = client.create_blob(gateway.write_model())
            return client.create(gateway.registry_model.name, files={"model.gguf": digest}).status

    assert await asyncio.to_thread(create) == "success"
    assert await gateway.chat(gateway.registry_model.name) == TEXT


async def test_defaults_of_a_model_apply_to_all_apis(gateway: Gateway) -> None:
    name = gateway.registry_model.name
    path = write_model(gateway.folder / "model.gguf", seed=1, talkative=True)
    await gateway.create(
        name,
        path,
        template=ECHO,
        system="Be brief. " * 20,
        parameters={"num_predict": 3, "seed": 7, "temperature": 0.5, "num_ctx": 512, "stop": ["<a>", "<b>"]},
        messages=[{"role": "user", "content": "Is it day?"}, {"role": "assistant", "content": "Yes."}],
        license=["MIT"],
    )
    info = await gateway.client.show(name)
    assert info.template == ECHO
    assert info.license == "MIT"
    assert info.parameters is not None
    assert info.parameters.splitlines() == [
        "temperature                    0.5",
        "seed                           7",
        'stop                           "<a>"',
        'stop                           "<b>"',
        "num_predict                    3",
        "num_ctx                        512",
    ]
    assert info.modelfile is not None
    assert f"FROM {name}:v1" in info.modelfile
    response = await gateway.client.chat(model=name, messages=HELLO)
    assert response.eval_count == 3
    # The template adds nothing to messages, and each byte is a token.
    system, history = "Be brief. " * 20, "Is it day?Yes."
    assert response.prompt_eval_count == len(f"{system}{history}Helloassistant:")
    with_system = await gateway.client.chat(model=name, messages=[{"role": "system", "content": "S"}, *HELLO])
    assert with_system.prompt_eval_count == len(f"S{history}Helloassistant:")
    assert (await gateway.client.chat(model=name, messages=HELLO, options={"num_predict": 5})).eval_count == 5
    (held,) = await gateway.engine.loaded()
    assert held.context == 512
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
        completion = await client.chat.completions.create(model=name, messages=HELLO)
        longer = await client.chat.completions.create(model=name, messages=HELLO, max_tokens=4)
    assert completion.usage is not None
    assert longer.usage is not None
    assert (completion.usage.completion_tokens, longer.usage.completion_tokens) == (3, 4)
    assert completion.usage.prompt_tokens == response.prompt_eval_count


@pytest.mark.parametrize("template", [TURN_TEMPLATE, CHAT_TEMPLATE])
async def test_a_go_template_is_used(gateway: Gateway, template: str) -> None:
    path = write_model(gateway.folder / "model.gguf", seed=1, talkative=True)
    await gateway.create(gateway.registry_model.name, path, template=template)
    conversation: list[dict[str, Any]] = [{"role": "system", "content": "Be brief."}, *HELLO]
    next_turn = [{"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Who is 'it' {{ 🎬 }}?"}]
    for messages in (conversation, [*conversation, *next_turn]):
        response = await gateway.client.chat(
            model=gateway.registry_model.name, messages=messages, options={"num_predict": 1}
        )
        assert response.prompt_eval_count == len(render(template, *messages).encode())  # each byte is a token


async def test_a_model_is_created_from_another_one(gateway: Gateway) -> None:
    name = gateway.registry_model.name
    await gateway.create(name, gateway.write_model(), system="One.", parameters={"temperature": 0, "top_k": 5})
    created = await gateway.client.create(f"{name}-b", from_=name, system="Two.", parameters={"top_k": 9})
    assert created.status == "success"
    version = await gateway.registry_model.registry.find(f"{name}-b")
    assert (version.defaults.system, version.defaults.parameters) == ("Two.", {"temperature": 0, "top_k": 9})
    info = await gateway.client.show(f"{name}-b")
    assert info.details is not None
    assert info.details.parent_model == f"{name}:v1"
    await gateway.retire(name)
    await gateway.client.delete(name)
    assert await gateway.chat(f"{name}-b") == TEXT


async def test_a_model_is_quantized(gateway: Gateway) -> None:
    name = gateway.registry_model.name
    # With two heads its rows have 32 values, the block size of q8_0.
    path = write_model(gateway.folder / "model.gguf", seed=1, heads=2)
    steps = await gateway.create(name, path, quantize="Q8_0")
    assert "quantizing F32 model to Q8_0" in steps
    (file,) = (await gateway.registry_model.registry.find(name)).files
    assert file.quantization == "q8_0"
    assert file.bytes < path.stat().st_size
    assert (await gateway.client.generate(model=name, prompt="Hello", options={"num_predict": 2})).eval_count == 2
    with pytest.raises(ollama.ResponseError, match="only models of 16 or 32 bits"):
        await gateway.client.create(f"{name}-b", from_=name, quantize="q4_0")


async def test_an_adapter_is_used_with_its_base_model(gateway: Gateway) -> None:
    name = gateway.registry_model.name
    options = {"options": {"temperature": 0, "num_predict": 20}}
    await gateway.create(name, write_model(gateway.folder / "model.gguf", seed=1, talkative=True), template=ECHO)
    path = write_adapter(gateway.folder / "adapter.gguf")
    adapters = {path.name: await gateway.client.create_blob(path)}
    created = await gateway.client.create(f"{name}-a", from_=name, adapters=adapters, system="Be brief.")
    assert created.status == "success"
    version = await gateway.registry_model.registry.find(f"{name}-a")
    assert (version.files, version.base_model) == ([], f"{name}:v1")
    assert version.adapter is not None
    assert version.adapter.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    adapted = await gateway.chat(f"{name}-a", **options)
    assert adapted != await gateway.chat(name, messages=[{"role": "system", "content": "Be brief."}, *HELLO], **options)
    assert f"{name}-a:latest" in {model.model for model in (await gateway.client.list()).models}
    info = await gateway.client.show(f"{name}-a")
    assert info.details is not None
    assert (info.template, info.details.parent_model) == (ECHO, f"{name}:v1")
    with pytest.raises(ollama.ResponseError, match="template and num_ctx of its base model"):
        await gateway.client.create(f"{name}-b", from_=f"{name}-a", parameters={"num_ctx": 512})
    other = _adapter(gateway.folder / "other.gguf", "qwen3")
    adapters = {other.name: await gateway.client.create_blob(other)}
    with pytest.raises(ollama.ResponseError, match="needs a model of the architecture qwen3"):
        await gateway.client.create(f"{name}-o", from_=name, adapters=adapters)
    await gateway.retire(name)
    with pytest.raises(ollama.ResponseError, match=f"{name}-a:v1 is an adapter for it"):
        await gateway.client.delete(name)


async def test_a_copy_survives_the_deletion_of_its_original(gateway: Gateway) -> None:
    name = gateway.registry_model.name
    await gateway.create(name, gateway.write_model())
    assert (await gateway.client.copy(name, f"{name}-b")).status == "success"
    with pytest.raises(ollama.ResponseError, match=f"{name}:v1 is served") as caught:
        await gateway.client.delete(name)
    assert caught.value.status_code == 409
    await gateway.retire(name)
    assert (await gateway.client.delete(f"{name}:latest")).status == "success"
    assert await gateway.chat(f"{name}-b") == TEXT
    with pytest.raises(ollama.ResponseError, match=f"There is no model '{name}'") as caught:
        await gateway.client.delete(name)
    assert caught.value.status_code == 404
    with pytest.raises(ollama.ResponseError, match="No version of a model"):
        await gateway.client.copy(name, "another")


async def test_models_are_deleted_through_openais_client(gateway: Gateway) -> None:
    name = gateway.registry_model.name
    for text in ("This is what the first one says.", TEXT):
        await gateway.create(name, gateway.write_model(text))
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="not-needed") as client:
        with pytest.raises(openai.ConflictError, match="is served"):
            await client.models.delete(f"{name}:v2")
        deleted = await client.models.delete(f"{name}:v1")
        assert (deleted.id, deleted.object, deleted.deleted) == (f"{name}:v1", "model", True)
        assert await gateway.chat(name) == TEXT
        with pytest.raises(openai.ConflictError, match="is served"):
            await client.models.delete(name)
        await gateway.retire(name)
        await client.models.delete(name)
        with pytest.raises(openai.NotFoundError):
            await client.models.retrieve(name)
    # It is not in memory any more.
    assert await gateway.engine.loaded() == []


async def test_an_incomplete_or_wrong_blob_is_refused(gateway: Gateway, caplog: pytest.LogCaptureFixture) -> None:
    content = b"GGUF" + bytes(9_000_000)
    right, wrong = (hashlib.sha256(text).hexdigest() for text in (content, b"wrong"))
    refused = await gateway.post(f"/api/blobs/sha256:{wrong}", content)
    assert refused.status_code == 400
    assert refused.json()["error"].startswith(f"The content has the digest sha256:{right}")
    assert (await gateway.post(f"/api/blobs/sha256:{wrong}", None, "HEAD")).status_code == 404

    async def cut_off() -> AsyncIterator[bytes]:
        yield content[:5_000_000]
        raise OSError("the line is cut")

    with pytest.raises(OSError, match="the line is cut"):
        await gateway.post(f"/api/blobs/sha256:{right}", cut_off())
    await eventually_async(lambda: _stored() == set())
    assert "failed" not in caplog.text  # a disconnect is no error of the server
    assert (await gateway.post(f"/api/blobs/sha256:{right}", None, "HEAD")).status_code == 404
    assert (await gateway.post("/api/blobs/sha256:abc", content)).status_code == 422
    assert _stored() == set()
    assert (await gateway.post(f"/api/blobs/sha256:{right}", content)).status_code == 201


async def test_unused_blobs_are_removed(gateway: Gateway) -> None:
    name = gateway.registry_model.name
    path = gateway.write_model(f"This is said by {name} alone, and by no other one.")
    await gateway.create(name, path)
    used = hashlib.sha256(path.read_bytes()).hexdigest()
    for content in (b"old", b"young"):
        await gateway.post(f"/api/blobs/sha256:{hashlib.sha256(content).hexdigest()}", content)
    old = hashlib.sha256(b"old").hexdigest()
    long_ago = now() - timedelta(hours=blob_cleanup.UNUSED_HOURS + 1)
    async with gateway.database.transaction() as session:
        await session.execute(update(Blob).where(Blob.sha256.in_([used, old])).values(used_at=long_ago))
    assert await blob_cleanup.sweep(gateway.database) == 1
    assert _stored() == {used, hashlib.sha256(b"young").hexdigest()}
    with pytest.raises(blobs.BlobNotFound):
        await blobs.touch(gateway.database, old)
    await gateway.retire(name)
    await gateway.client.delete(name)
    assert await blob_cleanup.sweep(gateway.database) == 1


@pytest.mark.parametrize(
    ("fields", "status", "reason"),
    [
        ({"model": "Big Name"}, 400, "not a valid name for a model"),
        ({"model": "m:v3"}, 400, "which creates its next version"),
        ({"from": "nobody"}, 404, "No version of a model 'nobody'"),
        ({"files": {"m.gguf": f"sha256:{'0' * 64}"}}, 404, "There is no blob"),
        ({"files": {"a": f"sha256:{'0' * 64}", "b": f"sha256:{'1' * 64}"}}, 400, "one GGUF file"),
        ({"quantize": "q3_x"}, 400, "There is no quantization"),
        ({"template": "{{ if .System }}{{ .System }}{{ end }}{{ .Unheard }}"}, 400, "Send a template in Jinja"),
        ({"template": "{% for x in %}"}, 400, "The template is not valid Jinja"),
        ({"parameters": {"temprature": 1}}, 422, "temprature"),
        ({}, 422, "either from or files is required"),
    ],
)
async def test_invalid_create_requests_are_refused(
    gateway: Gateway, fields: dict[str, Any], status: int, reason: str
) -> None:
    source = {} if {"files", "from"} & fields.keys() or not fields else {"from": "forgearr/tiny"}
    body = {"model": gateway.registry_model.name, **source, **fields}
    response = await gateway.post("/api/create", json.dumps(body))
    assert (response.status_code, reason in response.json()["error"]) == (status, True), response.text
    with pytest.raises(ModelNotFound):
        await gateway.registry_model.registry.find(gateway.registry_model.name)


@pytest.mark.parametrize("content", [b"GGUF" + b"\xff" * 100, b"PK\x03\x04 some archive", b""])
async def test_an_invalid_file_is_not_registered(gateway: Gateway, content: bytes) -> None:
    path = gateway.folder / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ollama.ResponseError, match="is not a GGUF file"):
        await gateway.create(gateway.registry_model.name, path)
    with pytest.raises(ModelNotFound):
        await gateway.registry_model.registry.model(gateway.registry_model.name)


async def test_a_file_is_pulled_by_its_path(gateway: Gateway) -> None:
    path = gateway.write_model().rename(gateway.folder / f"{gateway.registry_model.name.upper()}.Q8_0.gguf")
    name = f"{gateway.registry_model.name}.q8_0"
    steps = [step async for step in await gateway.client.pull(str(path), stream=True)]
    progress = [step for step in steps if step.digest]
    assert progress[-1].total == progress[-1].completed == path.stat().st_size
    assert progress[-1].digest == f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"
    assert steps[-1].status == "success"
    assert await gateway.chat(name) == TEXT
    assert (await gateway.client.pull(str(path))).status == "success"
    assert [version.number for version in (await gateway.registry_model.registry.model(name)).versions] == [1]
    assert (await gateway.client.pull(name)).status == "success"
    for unknown, reason in ((str(gateway.folder / "none.gguf"), "There is no file"), ("llama3.2", "no Ollama")):
        with pytest.raises(ollama.ResponseError, match=reason) as caught:
            await gateway.client.pull(unknown)
        assert caught.value.status_code == 404


async def test_push_is_refused(gateway: Gateway) -> None:
    with pytest.raises(ollama.ResponseError, match="cannot be pushed") as caught:
        await gateway.client.push("forgearr/tiny")
    assert caught.value.status_code == 501


def _stored() -> set[str]:
    return {file.name for file in Path(storage.address("blobs")).iterdir()}


def _adapter(path: Path, architecture: str) -> Path:
    writer = GGUFWriter(path, architecture)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 1.0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
