"""The GGUF engine on small models of random weights: answers, slots, the queue, memory, and what goes wrong."""

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
FOR_GOOD = Version("quiet", 1, "run", [FILE], None, "forgearr/tiny", "job_1", "job_2", True, datetime.now(UTC))
ENDLESS = 1_000_000
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"soon": {"type": "boolean"}}, "required": ["soon"]},
    },
}


class Models:
    """Files by reference, and how often each was asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.adapters: dict[str, Version] = {}
        self.ready = asyncio.Event()
        self.ready.set()

    def add(self, name: str, **shape: Any) -> Path:
        return write_model(self.folder / f"{name}.gguf", **shape)

    async def find(self, reference: str, source: Source, tell: OnProgress) -> Path:
        self.asked.append(reference)
        await self.ready.wait()
        return self.folder / f"{reference}.gguf"

    def add_adapter(self, name: str, base: str, **shape: Any) -> Version:
        path = write_adapter(self.folder / f"{name}.gguf", **shape)
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

    async def find_adapters(self, base: str, wanted: Version | None) -> dict[str, Path]:
        return {
            reference: self.folder / f"{adapter.name}.gguf"
            for reference, adapter in self.adapters.items()
            if adapter.base_model == base
        }


@pytest.fixture
def models(tmp_path: Path) -> Models:
    found = Models(tmp_path)
    found.add("quiet")
    found.add("talker", seed=1, talkative=True, context=16_384)
    return found


@pytest.fixture
def settings(home: Path) -> Callable[..., EngineSettings]:
    def chosen(**changes: Any) -> EngineSettings:
        modest = {"slots": 2, "queue": 2, "context": 16_384, "threads": 1, "memory_mb": 1024}
        return get_settings().engines.model_copy(update=modest | changes)

    return chosen


@pytest.fixture
async def engine(models: Models, settings: Callable[..., EngineSettings]) -> AsyncIterator[GgufEngine]:
    engine = GgufEngine(settings(), models.find, models.find_adapters)
    yield engine
    await unload_models(engine)


async def test_a_whole_answer(engine: GgufEngine) -> None:
    answer = await engine.complete("quiet", {**HELLO, "max_tokens": 12, "temperature": 0})
    (choice,) = answer["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"].encode()  # valid text, whatever bytes the model has chosen
    assert choice["finish_reason"] in {"stop", "length"}
    usage = answer["usage"]
    assert 1 <= usage["completion_tokens"] <= 12
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


@pytest.mark.parametrize("chosen", [{"temperature": 0}, {"temperature": 1.5, "seed": 7}])
async def test_a_streamed_answer_is_the_same_answer(engine: GgufEngine, chosen: dict[str, Any]) -> None:
    request = {**HELLO, "max_tokens": 40, **chosen}
    heard = await collect(engine.chat("talker", request))
    whole = await engine.complete("talker", request)
    assert heard["choices"] == whole["choices"]
    assert heard["usage"]["completion_tokens"] == 40


async def test_the_same_seed_gives_the_same_answer(engine: GgufEngine) -> None:
    request = {**HELLO, "max_tokens": 30, "temperature": 1.5}
    said = [(await engine.complete("talker", {**request, "seed": seed}))["choices"] for seed in (7, 7, 8)]
    assert said[0] == said[1] != said[2]


async def test_it_stops_where_it_is_told_to(engine: GgufEngine) -> None:
    whole = (await engine.complete("talker", {**HELLO, "max_tokens": 40, "temperature": 0}))["choices"][0]
    text: str = whole["message"]["content"]
    end = next(letter for letter in text[5:] if letter not in text[:5] and letter.isascii())
    short = await engine.complete("talker", {**HELLO, "max_tokens": 40, "temperature": 0, "stop": [end]})
    assert short["choices"][0]["message"]["content"] == text.partition(end)[0]
    assert short["choices"][0]["finish_reason"] == "stop"


async def test_a_schema_is_obeyed(engine: GgufEngine) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    wanted = {"type": "json_schema", "json_schema": {"name": "reply", "schema": schema}}
    answer = await engine.complete("quiet", {**HELLO, "max_tokens": 2000, "response_format": wanted})
    text = answer["choices"][0]["message"]["content"]
    assert text.startswith("{")
    assert '"ok"' in text


async def test_answers_are_given_side_by_side(engine: GgufEngine) -> None:
    """Two at a time, in two slots: each is still being given when the other one is."""
    async with (
        aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as one,
        aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as another,
    ):
        for _ in range(5):
            assert await anext(one)
            assert await anext(another)


async def test_who_leaves_frees_the_slot(models: Models, settings: Callable[..., EngineSettings]) -> None:
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


async def test_who_does_not_read_keeps_nobody_waiting(models: Models, settings: Callable[..., EngineSettings]) -> None:
    engine = GgufEngine(settings(slots=1, queue=0), models.find, models.find_adapters)
    request = {**HELLO, "max_tokens": 60, "temperature": 0}
    async with aclosing(read_ahead(engine.chat("talker", request))) as unread:
        heard = await anext(unread)
        await eventually_async(lambda: not engine.loaded_models[0].users)
        assert (await engine.complete("talker", request))["usage"]["completion_tokens"] == 60
        # Nothing of what was said meanwhile is lost.
        heard += [chunk async for chunks in unread for chunk in chunks]
    assert heard[-1]["usage"]["completion_tokens"] == 60


async def test_the_queue_has_an_end(models: Models, settings: Callable[..., EngineSettings]) -> None:
    engine = GgufEngine(settings(slots=1, queue=1), models.find, models.find_adapters)
    async with aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as answered:
        await anext(answered)
        waiting = asyncio.create_task(engine.complete("talker", {**HELLO, "max_tokens": 2}))
        await eventually_async(lambda: engine.loaded_models[0].users == 2)
        with pytest.raises(EngineBusy):
            await engine.complete("talker", HELLO)
        # Another model has a queue of its own.
        assert await engine.complete("quiet", {**HELLO, "max_tokens": 2})
        assert not waiting.done()
    assert (await waiting)["usage"]["completion_tokens"] == 2


async def test_a_model_is_loaded_once_for_all_who_wait(models: Models, engine: GgufEngine) -> None:
    models.ready.clear()
    asked = [asyncio.create_task(engine.complete("quiet", {**HELLO, "max_tokens": 2})) for _ in range(4)]
    asked[0].cancel()  # that one of them gives up does not matter to the others
    await asyncio.wait(asked[:1])
    models.ready.set()
    assert all(answer["usage"] for answer in await asyncio.gather(*asked[1:]))
    assert models.asked == ["quiet"]


async def test_the_least_recently_used_makes_room(models: Models, settings: Callable[..., EngineSettings]) -> None:
    for name in ("one", "two", "three"):
        models.add(name)
    needed = read_header(models.folder / "one.gguf").memory_bytes(2048, 2)
    told: list[list[str]] = []
    engine = GgufEngine(settings(memory_mb=-(-2 * needed // MB)), models.find, models.find_adapters, told.append)
    for name in ("one", "two", "one", "three"):
        await engine.complete(name, {**HELLO, "max_tokens": 1})
    assert [held.reference for held in engine.loaded_models] == ["one", "three"]
    assert told[-1] == ["one", "three"]


async def test_a_model_in_use_stays(models: Models, settings: Callable[..., EngineSettings]) -> None:
    models.add("other", context=16_384)
    needed = read_header(models.folder / "talker.gguf").memory_bytes(16_384, 2)
    engine = GgufEngine(settings(memory_mb=-(-needed // MB)), models.find, models.find_adapters)
    answer = engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})
    await anext(answer)
    waiting = asyncio.create_task(engine.complete("other", {**HELLO, "max_tokens": 2}))
    for _ in range(5):
        assert await anext(answer)
    while (await engine.loading())[0].phase == "fetching":
        assert await anext(answer)
    (arriving,) = await engine.loading()
    assert (arriving.reference, arriving.phase, arriving.bytes) == ("other", "waiting for room", None)
    await answer.aclose()
    assert await waiting
    assert [held.reference for held in engine.loaded_models] == ["other"]


async def test_a_model_that_cannot_fit_is_refused_with_the_numbers(models: Models, home: Path) -> None:
    models.add("large", layers=24, heads=16, context=16_384)
    settings = get_settings().engines.model_copy(update={"memory_mb": 64, "context": 16_384})
    engine = GgufEngine(settings, models.find, models.find_adapters)
    with pytest.raises(ModelTooLarge, match=r"large needs \d+ MB \(\d+ MB of weights.* allows 64 MB"):
        await engine.complete("large", HELLO)
    assert engine.loaded_models == []


async def test_unload_waits_for_the_last_answer(engine: GgufEngine) -> None:
    assert not await engine.unload("talker")
    answer = engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})
    await anext(answer)
    assert await engine.unload("talker")
    assert await anext(answer)
    await answer.aclose()
    assert engine.loaded_models == []
    assert await engine.complete("talker", {**HELLO, "max_tokens": 1})


async def test_a_long_conversation_is_refused(engine: GgufEngine) -> None:
    with pytest.raises(ContextExceeded, match="allows 2048"):
        await engine.complete("quiet", {"messages": [{"role": "user", "content": "x" * 5000}]})


async def test_reading_a_long_question_can_be_given_up(models: Models, settings: Callable[..., EngineSettings]) -> None:
    models.add("slow", layers=4, heads=8, context=16_384)
    engine = GgufEngine(settings(slots=1), models.find, models.find_adapters)
    await engine.complete("slow", {**HELLO, "max_tokens": 1})
    question: EngineRequest = {"messages": [{"role": "user", "content": "x" * 3_000}], "max_tokens": 1}
    asked = asyncio.create_task(engine.complete("slow", question))
    await eventually_async(lambda: engine.loaded_models[0].users)
    asked.cancel()
    with suppress(asyncio.CancelledError):
        await asked
    answer = await engine.complete("slow", question)
    # Had it read on, all of the question would be remembered now.
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] < 2_000


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": [{"role": "user"}]},
        {**HELLO, "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nonsense"}}}},
        {**HELLO, "tools": [{"type": "function"}]},
    ],
    ids=["no content", "bad schema", "bad tool"],
)
async def test_what_the_model_cannot_take_is_refused(engine: GgufEngine, wrong: EngineRequest) -> None:
    with pytest.raises(RequestRefused):
        await engine.complete("quiet", wrong)
    assert await engine.complete("quiet", {**HELLO, "max_tokens": 1})


@pytest.mark.parametrize("damage", ["empty", "text", "header", "weights"])
async def test_a_damaged_file_is_refused_and_the_engine_goes_on(
    models: Models, engine: GgufEngine, damage: str
) -> None:
    whole = (models.folder / "quiet.gguf").read_bytes()
    content = {"empty": b"", "text": b"hello" * 100, "header": whole[:2000], "weights": whole[:-100_000]}[damage]
    (models.folder / "damaged.gguf").write_bytes(content)
    for _ in range(2):
        with pytest.raises(ModelUnreadable, match=r"damaged\.gguf"):
            await engine.complete("damaged", HELLO)
    assert await engine.complete("quiet", {**HELLO, "max_tokens": 1})


async def test_nobody_else_can_speak_to_a_model(engine: GgufEngine) -> None:
    """llama.cpp opens a socket of its own; it is removed before anybody could use it."""
    process = psutil.Process()
    before = {connection.laddr for connection in process.net_connections("inet")}
    await engine.complete("quiet", {**HELLO, "max_tokens": 1})
    assert {connection.laddr for connection in process.net_connections("inet")} <= before
    sockets = [str(connection.laddr) for connection in process.net_connections("unix")]
    assert not [socket for socket in sockets if socket.endswith(".sock") and os.path.exists(socket)]  # noqa: PTH110, ASYNC240


def test_what_a_file_says_of_itself(models: Models) -> None:
    header = read_header(models.folder / "talker.gguf")
    assert (header.architecture, header.layers, header.hidden_size, header.context) == ("llama", 2, 64, 16_384)
    assert header.vocab_size == 260
    assert header.kv_width == 2 * 64
    cache = 2 * (2 * 64) * 2 * 1000 * 3
    assert header.memory_bytes(1000, 3) - header.memory_bytes(1000, 0) == cache


async def test_files_are_found_only_once_for_a_shelf(models: Models, settings: Callable[..., EngineSettings]) -> None:
    files = GgufLoader(settings(), models.find, models.find_adapters)
    pool = ModelPool[LlamaCppModel](1024 * MB, settings())
    for _ in range(2):
        async with pool.use("quiet", lambda tell: files.prepare("quiet", None, "answers", tell)):
            pass
    assert models.asked == ["quiet"]


async def test_adapters_share_the_model_they_stand_on(models: Models, engine: GgufEngine) -> None:
    request = {**HELLO, "max_tokens": 20, "temperature": 0}
    first, second = models.add_adapter("first", "talker", seed=1), models.add_adapter("second", "talker", seed=2)
    nothing = models.add_adapter("nothing", "talker", strength=0)

    async def said(reference: str, version: Version | None = None) -> str:
        return (await engine.complete(reference, request, version))["choices"][0]["message"]["content"]

    plain = await said("talker")
    # At once, so that they stand beside each other in the same model.
    texts = await asyncio.gather(*(said(one.reference, one) for one in (first, second, nothing)))
    assert len({plain, *texts[:2]}) == 3
    assert texts[2] == plain == await said("talker")
    assert models.asked == ["talker"]
    assert [held.reference for held in await engine.loaded()] == ["talker"]


async def test_an_adapter_that_came_later_has_its_model_loaded_once_more(models: Models, engine: GgufEngine) -> None:
    request = {**HELLO, "max_tokens": 20, "temperature": 0}
    async with aclosing(engine.chat("talker", {**HELLO, "max_tokens": ENDLESS})) as under_way:
        await anext(under_way)
        late = models.add_adapter("late", "talker")
        changed = await engine.complete(late.reference, request, late)
        assert await anext(under_way)  # the old one stays for it
        assert len(await engine.loaded()) == 2
    plain = await engine.complete("talker", request)
    assert plain["choices"] != changed["choices"]
    assert models.asked == ["talker", "talker"]
    assert len(await engine.loaded()) == 1
    with pytest.raises(RequestRefused, match="is an adapter"):
        await engine.embed(late.reference, ["Hello"], late)


async def test_a_model_is_let_go_before_anybody_asked_it(engine: GgufEngine) -> None:
    await engine.load("quiet", FOR_GOOD)
    assert await engine.unload("quiet")
    assert engine.loaded_models == []
