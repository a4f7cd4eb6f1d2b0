"""LLM10, unbounded consumption: what a user wants of the memory that all models share."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cluster.settings import get_settings
from pipelines.training.models import tiny
from serve.engines.gguf import tiny as gguf_tiny
from serve.engines.gguf.replica import GgufEngine
from tests.support.api_client import ApiClient
from tests.support.app_server import unload_models
from tests.support.registry_model import RegistryModel
from tests.support.small_models import write_constant_model
from tests.support.waiting import eventually_async

pytestmark = pytest.mark.parametrize("database", ["sqlite"], indirect=True)

HELLO = [{"role": "user", "content": "Hello"}]
EMPTY: dict[str, dict[str, Any]] = {"/api/chat": {"messages": []}, "/api/generate": {"prompt": ""}}
REQUESTS: dict[str, dict[str, Any]] = {
    "/api/chat": {"messages": HELLO, "options": {"num_predict": 1}},
    "/api/generate": {"prompt": "Hello", "options": {"num_predict": 1}},
    "/api/embed": {"input": "Hello"},
    "/api/embeddings": {"prompt": "Hello"},
}


class Memory:
    """The models in the memory of an engine that all accounts share."""

    def __init__(self, api: ApiClient, registry_model: RegistryModel, engine: GgufEngine) -> None:
        self.api = api
        self.registry_model = registry_model
        self.engine = engine

    async def register(self, owner: str | None, *, served: bool = False, shared: bool = False) -> str:
        file = write_constant_model(self.registry_model.folder / "constant.gguf", "I am here for everybody.")
        owner_id = self.api.users[owner].id if owner else None
        version = await self.registry_model.register(file.read_bytes(), owner_id=owner_id)
        if shared:
            await self.registry_model.registry.set_visibility(version.name, version.number, "shared")
        if served:
            await self.registry_model.registry.set_served(version.name, version.number)
        return version.reference

    async def send(self, username: str, path: str, model: str, **fields: Any) -> int:
        response = await self.api.request(username, "POST", path, json={"model": model, **fields})
        return response.status_code

    @property
    def limits(self) -> dict[str, bool]:
        """The loaded models, and whether each is unloaded after some time."""
        return {model.reference: model.leaves_at is not None for model in self.engine.loaded_models}


@pytest.fixture
async def memory(
    api: ApiClient, registry_model: RegistryModel, home: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Memory]:
    monkeypatch.setenv("FORGEARR_ENGINES__SLOTS", "1")
    monkeypatch.setenv("FORGEARR_ENGINES__KEEP_ALIVE", "1h")
    get_settings.cache_clear()
    tiny_file = home / "cache" / f"{tiny.folder_name()}-{gguf_tiny.QUANTIZATION}.gguf"
    tiny_file.parent.mkdir()
    write_constant_model(tiny_file, "I am here for everybody, too.")
    engine = api.app.state.engine = GgufEngine(get_settings().engines)
    yield Memory(api, registry_model, engine)
    await unload_models(engine)


@pytest.mark.parametrize(
    "model", [{"owner": None, "served": True}, {"owner": "ada", "shared": True}, None], ids=["served", "shared", "tiny"]
)
async def test_unload_a_model_that_others_use(memory: Memory, model: dict[str, Any] | None) -> None:
    reference = tiny.NAME if model is None else await memory.register(**model)
    for path, empty in EMPTY.items():
        # To load it is everybody's right, to keep it in memory is not.
        assert await memory.send("ada", path, reference, **empty, keep_alive=-1) == 200
        for username in ("ada", "bob"):
            body = {"model": reference, "keep_alive": 0, **empty}
            refused = await memory.api.request(username, "POST", path, json=body)
            assert (refused.status_code, refused.json()["error_code"]) == (403, "UNLOAD_FORBIDDEN")
        assert memory.limits == {reference: True}
        assert await memory.send("admin", path, reference, **empty, keep_alive=0) == 200
        assert memory.limits == {}


async def test_unload_or_pin_a_served_model_with_an_ordinary_request(memory: Memory) -> None:
    reference = await memory.register(None, served=True)
    for path, body in REQUESTS.items():
        for keep_alive in (0, "1ms", -1):
            # Clients send the field with everything, so the request is answered.
            assert await memory.send("bob", path, reference, **body, keep_alive=keep_alive) == 200
            assert memory.limits == {reference: True}, path
    for path, body in REQUESTS.items():
        assert await memory.send("admin", path, reference, **body, keep_alive=-1) == 200
        assert memory.limits == {reference: False}, path
        assert await memory.send("admin", path, reference, **body, keep_alive="1h") == 200


async def test_the_memory_of_a_private_model_is_its_owners(memory: Memory) -> None:
    reference = await memory.register("ada")
    assert await memory.send("ada", "/api/chat", reference, **REQUESTS["/api/chat"], keep_alive=-1) == 200
    assert memory.limits == {reference: False}
    assert await memory.send("ada", "/api/chat", reference, messages=[], keep_alive=0) == 200
    assert memory.limits == {}


CHATS: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": HELLO},
    "/v1/completions": {"prompt": "Hello"},
    "/v1/responses": {"input": "Hello"},
    "/api/chat": {"messages": HELLO, "stream": False},
    "/api/generate": {"prompt": "Hello", "stream": False},
}


@pytest.mark.parametrize("path", CHATS)
async def test_take_all_slots_of_a_model(memory: Memory, path: str) -> None:
    """Somebody else waits for one answer, not for all that were asked for before."""
    model, finished = await memory.register(None, served=True), list[str]()

    async def ask(username: str) -> None:
        assert await memory.send(username, path, model, **CHATS[path]) == 200
        finished.append(username)

    async def all_wait(count: int) -> None:
        await eventually_async(lambda: [loaded.users for loaded in memory.engine.loaded_models] == [count])

    await ask("ada")
    (pooled,) = memory.engine._pool.loaded()  # pyright: ignore[reportPrivateUsage]
    slots = pooled.loading.result()._slots  # pyright: ignore[reportPrivateUsage]
    async with slots.take(memory.api.users["ada"].id):
        greedy = [asyncio.create_task(ask("ada")) for _ in range(8)]
        await all_wait(8)
        modest = asyncio.create_task(ask("bob"))
        await all_wait(9)
    await asyncio.gather(modest, *greedy)
    assert finished.index("bob") == 1


async def test_fill_the_queue_of_a_model(memory: Memory) -> None:
    """One account may have half of the queue. Another one still gets an answer."""
    model = await memory.register(None, served=True)
    body = {"model": model, "messages": HELLO, "max_tokens": 1}

    async def ask(username: str) -> httpx.Response:
        return await memory.api.request(username, "POST", "/v1/chat/completions", json=body)

    responses = await asyncio.gather(*(ask("ada") for _ in range(50)), ask("bob"))
    refused = [response for response in responses[:-1] if response.status_code == 503]
    assert len(refused) == 50 - (1 + 32)
    assert refused[0].json()["error"]["code"] == "engine_busy"
    assert "your account" in refused[0].json()["error"]["message"]
    assert responses[-1].status_code == 200
