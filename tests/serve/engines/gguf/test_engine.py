"""The GGUF engine on small models of random weights: completions, slots, the queue, memory, and errors."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.db import now
from cluster.settings import EngineSettings, get_settings
from pipelines.training.models.registry import OnProgress
from pipelines.training.models.versions import ModelFile, Version
from serve.engines.collect import collect
from serve.engines.gguf.model import LlamaCppModel
from serve.engines.gguf.replica import GgufEngine, GgufLoader
from serve.engines.local.pool import MB, ModelPool
from serve.engines.model_header import ModelUnreadable, read_header
from serve.engines.protocol import ContextExceeded, EngineBusy, EngineRequest, ModelTooLarge, RequestRefused, Source
from serve.engines.read_ahead import read_ahead
from tests.support.app_server import unload_models
from tests.support.small_models import write_adapter, write_model
from tests.support.waiting import eventually_async

HELLO: EngineRequest = {"messages": [{"role": "user", "content": "Hello"}]}
FILE = ModelFile("quiet.gguf", "q8_0", "", 1)
VERSION = Version("quiet", 1, "run", [FILE], None, "forgearr/tiny", "job_1", "job_2", True, datetime.now(UTC))
ENDLESS = 1_000_000
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"soon": {"type": "boolean"}}, "required": ["soon"]},
    },
}


class Models:
    """Model files by reference, and the references that were requested."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.requested: list[str] = []
        self.adapters: dict[str, Version] = {}
        self.ready = asyncio.Event()
        self.ready.set()

    def add(self, name: str, **options: Any) -> Path:
        return write_model(self.folder / f"{name}.gguf", **options)

    async def find(self, reference: str, source: Source, on_progress: OnProgress) -> Path:
        self.requested.append(reference)
        await self.ready.wait()
        return self.folder / f"{reference}.gguf"

    def add_adapter(self, name: str, base: str, **options: Any) -> Version:
        path = write_adapter(self.folder / f"{name}.gguf", **options)
        adapter = Version(
            name=name,
            number=1,
            run_id="",
            files=[],
            adapter=ModelFile(path.name, "lora", "", path.stat().st_size),
            base_model=base,
            job_id="",
            export_job_id="",
            passed=None,
            created_at=now(),
        )
        self.adapters[adapter.reference] = adapter
        return adapter

    async def find_adapters(self, base: str, version: Version | None) -> dict[str, Path]:
        return {
            reference: self.folder / f"{adapter.name}.gguf"
            for reference, adapter in self.adapters.items()
            if adapter.base_model == base
        }


@pytest.fixture
def models(tmp_path: Path) -> Models:
    models = Models(tmp_path)
    models.add("quiet")
    models.add("talker", seed=1, talkative=True, context=16_384)
    return models


@pytest.fixture
def settings(home: Path) -> Callable[..., EngineSettings]:
    def build(**changes: Any) -> EngineSettings:
        small = {"slots": 2, "queue": 2, "context": 16_384, "threads": 1, "memory_mb": 1024}
        return get_settings().engines.model_copy(update=small | changes)

    return build


@pytest.fixture
async def engine(models: Models, settings: Callable[..., EngineSettings]) -> AsyncIterator[GgufEngine]:
    engine = GgufEngine(settings(), models.find, models.find_adapters)
    yield engine
    await unload_models(engine)


async def test_a_completion(engine: GgufEngine) -> None:
    completion = await engine.complete("quiet", {**HELLO, "max_tokens": 12, "temperature": 0})
    (choice,) = completion["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].encode()  # valid text, whatever bytes were sampled
    assert choice["finish_reason"] in {"stop", "length"}
    usage = completion["usage"]
    assert 1 <= usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1.5, "seed": 7}])
async def test_streamed_chunks_add_up_to_the_completion(engine: GgufEngine, sampling: dict[str, Any]) -> None:
    request = {**HELLO, "max_tokens": 40, **sampling}
    streamed = await collect(engine.chat("talker", request))
    completion = await engine.complete("talker", request)
    assert streamed["choices"] == completion["choices"]
    assert streamed["usage"]["completion_tokens"] == 40


async def test_the_same_seed_gives_the_same_completion(engine: GgufEngine) -> None:
    request = {**HELLO, "max_tokens": 30, "temperature": 1.5}
    choices = [(await engine.complete("talker", {**request, "seed": seed}))["choices"] for seed in (7, 7, 8)]
    assert choices[0] == choices[1] != choices[2]


async def test_generation_ends_at_a_stop_sequence(engine: GgufEngine) -> None:
    choice = (await engine.complete("talker", {**HELLO, "max_tokens": 40, "temperature": 0}))["choices"][0]
    text: str = choice["message"]["content"]
    stop = next(letter for letter in text[5:] if letter not in text[:5] and letter.isascii())
    short = await engine.complete("talker", {**HELLO, "max_tokens": 40, "temperature": 0, "stop": [stop]})
    assert short["choices"][0]["message"]["content"] == text.partition(stop)[0]
    assert short["choices"][0]["finish_reason"] == "stop"


async def test_a_completion_follows_a_schema(engine: GgufEngine) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    response_format = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    completion = await engine.complete("quiet", {**HELLO, "max_tokens": 2000, "response_format": response_format})
    text = completion["choices"][0]["message"]["content"]
    assert text.startswith("{")
    assert '"ok"' in text


async def test_completions_run_concurrently(engine: GgufEngine) -> None:
    """Two at a time, in two slots: each continues while the other one does."""
    async with (
        aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as one,
        aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as another,
    ):
        for _ in range(5):
            assert await anext(one)
            assert await anext(another)


async def test_a_disconnected_client_frees_its_slot(models: Models, settings: Callable[..., EngineSettings]) -> None:
    engine = GgufEngine(settings(slots=1), models.find, models.find_adapters)
    async with aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as left:
        await anext(left)
    cancelled = asyncio.create_task(engine.complete("talker", {**HELLO, "max_tokens": ENDLESS}))
    await eventually_async(lambda: engine.loaded_models[0].users)
    cancelled.cancel()
    with suppress(asyncio.CancelledError):
        await cancelled
    assert engine.loaded_models[0].users == 0
    assert (await engine.complete("talker", {**HELLO, "max_tokens": 3}))["usage"]["completion_tokens"] == 3


async def test_a_slow_reader_does_not_block_its_slot(models: Models, settings: Callable[..., EngineSettings]) -> None:
    engine = GgufEngine(settings(slots=1, queue=0), models.find, models.find_adapters)
    request = {**HELLO, "max_tokens": 60, "temperature": 0}
    async with aclosing(read_ahead(engine.chat("talker", request))) as unread:
        chunks = await anext(unread)
        await eventually_async(lambda: not engine.loaded_models[0].users)
        assert (await engine.complete("talker", request))["usage"]["completion_tokens"] == 60
        # All chunks that were generated meanwhile are still there.
        chunks += [chunk async for part in unread for chunk in part]
    assert chunks[-1]["usage"]["completion_tokens"] == 60


async def test_a_full_queue_refuses_requests(models: Models, settings: Callable[..., EngineSettings]) -> None:
    engine = GgufEngine(settings(slots=1, queue=1), models.find, models.find_adapters)
    async with aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as stream:
        await anext(stream)
        waiting = asyncio.create_task(engine.complete("talker", {**HELLO, "max_tokens": 2}))
        await eventually_async(lambda: engine.loaded_models[0].users == 2)
        with pytest.raises(EngineBusy):
            await engine.complete("talker", HELLO)
        # Another model has its own queue.
        assert await engine.complete("quiet", {**HELLO, "max_tokens": 2})
        assert not waiting.done()
    assert (await waiting)["usage"]["completion_tokens"] == 2


async def test_simultaneous_requests_load_a_model_once(models: Models, engine: GgufEngine) -> None:
    models.ready.clear()
    requests = [asyncio.create_task(engine.complete("quiet", {**HELLO, "max_tokens": 2})) for _ in range(4)]
    requests[0].cancel()  # cancelling one request does not affect the others
    await asyncio.wait(requests[:1])
    models.ready.set()
    assert all(completion["usage"] for completion in await asyncio.gather(*requests[1:]))
    assert models.requested == ["quiet"]


async def test_the_least_recently_used_model_is_unloaded(
    models: Models, settings: Callable[..., EngineSettings]
) -> None:
    for name in ("one", "two", "three"):
        models.add(name)
    needed = read_header(models.folder / "one.gguf").memory_bytes(2048, 2)
    reports: list[list[str]] = []
    engine = GgufEngine(settings(memory_mb=-(-2 * needed // MB)), models.find, models.find_adapters, reports.append)
    for name in ("one", "two", "one", "three"):
        await engine.complete(name, {**HELLO, "max_tokens": 1})
    assert [held.reference for held in engine.loaded_models] == ["one", "three"]
    assert reports[-1] == ["one", "three"]


async def test_a_model_in_use_stays_loaded(models: Models, settings: Callable[..., EngineSettings]) -> None:
    models.add("other", context=16_384)
    needed = read_header(models.folder / "talker.gguf").memory_bytes(16_384, 2)
    engine = GgufEngine(settings(memory_mb=-(-needed // MB)), models.find, models.find_adapters)
    stream = engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})
    await anext(stream)
    waiting = asyncio.create_task(engine.complete("other", {**HELLO, "max_tokens": 2}))
    for _ in range(5):
        assert await anext(stream)
    while (await engine.loading())[0].phase == "fetching":
        assert await anext(stream)
    (loading,) = await engine.loading()
    assert (loading.reference, loading.phase, loading.bytes) == ("other", "waiting for room", None)
    await stream.aclose()
    assert await waiting
    assert [held.reference for held in engine.loaded_models] == ["other"]


async def test_a_too_large_model_is_refused_with_its_sizes(models: Models, home: Path) -> None:
    models.add("large", layers=24, heads=16, context=16_384)
    settings = get_settings().engines.model_copy(update={"memory_mb": 64, "context": 16_384})
    engine = GgufEngine(settings, models.find, models.find_adapters)
    with pytest.raises(ModelTooLarge, match=r"large needs \d+ MB \(\d+ MB of weights.* allows 64 MB"):
        await engine.complete("large", HELLO)
    assert engine.loaded_models == []


async def test_unload_waits_for_running_completions(engine: GgufEngine) -> None:
    assert not await engine.unload("talker")
    stream = engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})
    await anext(stream)
    assert await engine.unload("talker")
    assert await anext(stream)
    await stream.aclose()
    assert engine.loaded_models == []
    assert await engine.complete("talker", {**HELLO, "max_tokens": 1})


async def test_a_long_conversation_is_refused(engine: GgufEngine) -> None:
    with pytest.raises(ContextExceeded, match="allows 2048"):
        await engine.complete("quiet", {"messages": [{"role": "user", "content": "x" * 5000}]})


async def test_processing_of_a_long_prompt_can_be_cancelled(
    models: Models, settings: Callable[..., EngineSettings]
) -> None:
    models.add("slow", layers=4, heads=8, context=16_384)
    engine = GgufEngine(settings(slots=1), models.find, models.find_adapters)
    await engine.complete("slow", {**HELLO, "max_tokens": 1})
    request: EngineRequest = {"messages": [{"role": "user", "content": "x" * 3_000}], "max_tokens": 1}
    cancelled = asyncio.create_task(engine.complete("slow", request))
    await eventually_async(lambda: engine.loaded_models[0].users)
    cancelled.cancel()
    with suppress(asyncio.CancelledError):
        await cancelled
    completion = await engine.complete("slow", request)
    # If the engine had continued, the whole prompt would be cached now.
    assert completion["usage"]["prompt_tokens_details"]["cached_tokens"] < 2_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"role": "user"}]},
        {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {**HELLO, "tools": [{"type": "function"}]},
    ],
    ids=["no content", "bad schema", "bad tool"],
)
async def test_invalid_requests_are_refused(engine: GgufEngine, wrong: EngineRequest) -> None:
    with pytest.raises(RequestRefused):
        await engine.complete("quiet", wrong)
    assert await engine.complete("quiet", {**HELLO, "max_tokens": 1})


@pytest.mark.parametrize("damage", ["empty", "text", "header", "weights"])
async def test_a_damaged_file_is_refused_and_other_models_still_work(
    models: Models, engine: GgufEngine, damage: str
) -> None:
    intact = (models.folder / "quiet.gguf").read_bytes()
    content = {"empty": b"", "text": b"hello" * 100, "header": intact[:2000], "weights": intact[:-100_000]}[damage]
    (models.folder / "damaged.gguf").write_bytes(content)
    for _ in range(2):
        with pytest.raises(ModelUnreadable, match=r"damaged\.gguf"):
            await engine.complete("damaged", HELLO)
    assert await engine.complete("quiet", {**HELLO, "max_tokens": 1})


async def test_no_socket_of_a_model_stays_open(engine: GgufEngine) -> None:
    """llama.cpp opens its own socket. The engine removes it before anybody can use it."""
    process = psutil.Process()
    before = {connection.laddr for connection in process.net_connections("inet")}
    await engine.complete("quiet", {**HELLO, "max_tokens": 1})
    assert {connection.laddr for connection in process.net_connections("inet")} <= before
    sockets = [str(connection.laddr) for connection in process.net_connections("unix")]
    assert not [socket for socket in sockets if socket.endswith(".sock") and os.path.exists(socket)]  # noqa: PTH110, ASYNC240


def test_the_header_of_a_file_is_read(models: Models) -> None:
    header = read_header(models.folder / "talker.gguf")
    assert (header.architecture, header.layers, header.hidden_size, header.context) == ("llama", 2, 64, 16_384)
    assert header.vocab_size == 260
    assert header.kv_width == 2 * 64
    cache = 2 * (2 * 64) * 2 * 1000 * 3
    assert header.memory_bytes(1000, 3) - header.memory_bytes(1000, 0) == cache


async def test_a_file_is_resolved_once_for_each_pool(models: Models, settings: Callable[..., EngineSettings]) -> None:
    loader = GgufLoader(settings(), models.find, models.find_adapters)
    pool = ModelPool[LlamaCppModel](1024 * MB, settings())
    for _ in range(2):
        async with pool.use("quiet", lambda on_progress: loader.prepare("quiet", None, "answers", on_progress)):
            pass
    assert models.requested == ["quiet"]


async def test_adapters_share_their_base_model(models: Models, engine: GgufEngine) -> None:
    request = {**HELLO, "max_tokens": 20, "temperature": 0}
    first, second = models.add_adapter("first", "talker", seed=1), models.add_adapter("second", "talker", seed=2)
    without_effect = models.add_adapter("nothing", "talker", strength=0)

    async def complete(reference: str, version: Version | None = None) -> str:
        return (await engine.complete(reference, request, version))["choices"][0]["message"]["content"]

    plain = await complete("talker")
    # At once, so that the adapters are in use side by side in one model.
    texts = await asyncio.gather(*(complete(adapter.reference, adapter) for adapter in (first, second, without_effect)))
    assert len({plain, *texts[:2]}) == 3
    assert texts[2] == plain == await complete("talker")
    assert models.requested == ["talker"]
    assert [held.reference for held in await engine.loaded()] == ["talker"]


async def test_a_new_adapter_loads_its_base_model_again(models: Models, engine: GgufEngine) -> None:
    request = {**HELLO, "max_tokens": 20, "temperature": 0}
    async with aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as stream:
        await anext(stream)
        late = models.add_adapter("late", "talker")
        changed = await engine.complete(late.reference, request, late)
        assert await anext(stream)  # the old model stays for the stream
        assert len(await engine.loaded()) == 2
    plain = await engine.complete("talker", request)
    assert plain["choices"] != changed["choices"]
    assert models.requested == ["talker", "talker"]
    assert len(await engine.loaded()) == 1
    with pytest.raises(RequestRefused, match="is an adapter"):
        await engine.embed(late.reference, ["Hello"], late)


async def test_an_unused_model_can_be_unloaded(engine: GgufEngine) -> None:
    await engine.load("quiet", VERSION)
    assert await engine.unload("quiet")
    assert engine.loaded_models == []
