"""The engine on transformers, with forgearr/tiny as it lies in a folder: one batch for all, and what it says."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.settings import EngineSettings, get_settings
from serve.engines.collect import collect
from serve.engines.local.engine import LocalEngine
from serve.engines.local.pool import MB
from serve.engines.model_header import ModelUnreadable
from serve.engines.protocol import (
    ContextExceeded,
    EngineBusy,
    EngineFailed,
    EngineRequest,
    ModelFolder,
    ModelTooLarge,
    RequestRefused,
    TextTooLong,
)
from serve.engines.transformers.model import TransformersModel
from serve.engines.transformers.replica import TransformersLoader
from serve.engines.transformers.sampling import Sampler, Sampling
from serve.engines.transformers.text_stream import REPLACEMENT_CHARACTER, IncrementalDecoder, OutputParser
from tests.support.app_server import unload_models
from tests.support.small_models import write_folder
from tests.support.waiting import eventually, eventually_async

HELLO: EngineRequest = {"messages": [{"role": "user", "content": "Hello"}]}
GREEDY = {**HELLO, "temperature": 0}
NOW = datetime.now(UTC)
CONTEXT = 2048

Settings = Callable[..., EngineSettings]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def model_folder(folder: Path) -> ModelFolder:
    return ModelFolder(str(folder), "forgearr/tiny", NOW)


@pytest.fixture(scope="module")
def adapted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """An adapter that changes what the model says."""
    target = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    wanted = LoraConfig(r=8, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(model, wanted).save_pretrained(str(target))
    return ModelFolder(str(target), str(folder), NOW)


@pytest.fixture
def settings(home: Path) -> Settings:
    def chosen(**changes: Any) -> EngineSettings:
        modest = {"slots": 2, "queue": 2, "context": CONTEXT, "threads": 1, "memory_mb": 1024}
        return get_settings().engines.model_copy(update=modest | changes)

    return chosen


class Engines:
    """The engines of a test. In the end they let their models go."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._made: list[LocalEngine[TransformersModel]] = []

    def make(self, **changes: Any) -> LocalEngine[TransformersModel]:
        settings = self._settings(**changes)
        engine = LocalEngine(settings, TransformersLoader(settings))
        self._made.append(engine)
        return engine

    async def close(self) -> None:
        for engine in self._made:
            await unload_models(engine)


@pytest.fixture
async def engines(settings: Settings) -> AsyncIterator[Engines]:
    made = Engines(settings)
    yield made
    await made.close()


async def spoken(engine: LocalEngine[TransformersModel], request: EngineRequest, source: ModelFolder) -> dict[str, Any]:
    return await collect(engine.chat("house", request, source))


def content(answer: dict[str, Any]) -> str:
    return answer["choices"][0]["message"]["content"]


def by_generate(folder: Path, count: int, model: Any = None) -> tuple[str, int]:
    """What transformers' plain way says, and how many tokens the question has."""
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model = model or AutoModelForCausalLM.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(HELLO["messages"], add_generation_prompt=True, return_tensors="pt")[
        "input_ids"
    ]
    said = model.generate(input_ids=asked, do_sample=False, max_new_tokens=count)[0][asked.shape[1] :]
    # Half a letter at the end is none.
    return tokenizer.decode(said, skip_special_tokens=True).rstrip(REPLACEMENT_CHARACTER), asked.shape[1]


async def test_it_says_what_the_model_says(engines: Engines, model_folder: ModelFolder, folder: Path) -> None:
    expected, asked = by_generate(folder, 24)
    engine = engines.make()
    whole = await engine.complete("house", {**GREEDY, "max_tokens": 24}, model_folder)
    assert content(whole) == expected
    assert whole["usage"] == {"prompt_tokens": asked, "completion_tokens": 24, "total_tokens": asked + 24}
    assert whole["choices"][0]["finish_reason"] == "length"
    assert (await spoken(engine, {**GREEDY, "max_tokens": 24}, model_folder))["choices"] == whole["choices"]


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For how many answers each step of a model was."""
    taken: list[int] = []
    step = Sampler.__call__

    def counted(self: Sampler, scores: Any, arguments: torch.Tensor) -> Any:
        taken.append(len(scores))
        return step(self, scores, arguments)

    monkeypatch.setattr(Sampler, "__call__", counted)
    return taken


async def test_many_are_answered_in_one_batch(
    engines: Engines, model_folder: ModelFolder, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step of the model is for all: six answers of 20 tokens, four at a time, take far fewer than 120 steps."""
    engine = engines.make(slots=4)
    alone = content(await engine.complete("house", {**GREEDY, "max_tokens": 20}, model_folder))
    steps.clear()
    asked = [{"messages": [{"role": "user", "content": "Hello" * count}], "temperature": 0} for count in range(1, 7)]
    step = Sampler.__call__

    def once_all_have_asked(self: Sampler, scores: Any, arguments: torch.Tensor) -> Any:
        if not steps:
            eventually(lambda: len(self.by_request_id) == len(asked))
        return step(self, scores, arguments)

    monkeypatch.setattr(Sampler, "__call__", once_all_have_asked)
    said = await asyncio.gather(*(engine.complete("house", {**one, "max_tokens": 20}, model_folder) for one in asked))
    assert content(said[0]) == alone
    assert len({content(one) for one in said}) > 1
    assert sum(steps) == 120
    assert len(steps) <= 60
    assert max(steps) == 4


async def test_the_same_seed_gives_the_same_answer(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make()
    request = {**HELLO, "max_tokens": 16, "temperature": 1.5, "top_k": 0, "top_p": 1, "min_p": 0}
    said = [content(await engine.complete("house", {**request, "seed": seed}, model_folder)) for seed in (7, 7, 8)]
    assert said[0] == said[1] != said[2]


async def test_it_stops_where_it_is_told_to(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make()
    text = content(await engine.complete("house", {**GREEDY, "max_tokens": 24}, model_folder))
    # Across the border of two tokens: these are words, and it takes the end of one and the beginning of another.
    stop = text[9:14]
    short = await engine.complete("house", {**GREEDY, "max_tokens": 24, "stop": ["never", stop]}, model_folder)
    assert content(short) == text.partition(stop)[0]
    assert short["choices"][0]["finish_reason"] == "stop"
    assert short["usage"]["completion_tokens"] < 24


async def test_a_prompt_is_gone_on_from(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make()
    whole = await engine.complete(
        "house", {"prompt": "Hello", "max_tokens": 5, "temperature": 0, "logprobs": 2}, model_folder
    )
    (choice,) = whole["choices"]
    assert choice["text"]
    told = choice["logprobs"]["content"]
    assert "".join(one["token"] for one in told) == choice["text"]
    assert all(len(one["top_logprobs"]) == 2 for one in told)
    # The likeliest was taken.
    assert all(one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0 for one in told)


async def test_bias_and_penalties(engines: Engines, model_folder: ModelFolder, folder: Path) -> None:
    engine = engines.make()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    (token,) = tokenizer("Why")["input_ids"]
    request = {**GREEDY, "max_tokens": 4, "logit_bias": [[token, 1000]]}
    assert content(await engine.complete("house", request, model_folder)) == "WhyWhyWhyWhy"
    other = await engine.complete("house", {**request, "presence_penalty": 2000}, model_folder)
    assert content(other).count("Why") == 1


async def test_who_leaves_is_out_of_the_batch(engines: Engines, model_folder: ModelFolder, steps: list[int]) -> None:
    engine = engines.make(slots=1, queue=1)
    async with aclosing(engine.chat("house", {**GREEDY, "logit_bias": [[2, -1000]]}, model_folder)) as left:
        await anext(left)
    before = len(steps)
    await engine.complete("house", {**GREEDY, "max_tokens": 3}, model_folder)
    assert len(steps) < before + 100  # of the two thousand that the other answer had room for
    cancelled = asyncio.create_task(engine.complete("house", GREEDY, model_folder))
    await eventually_async(lambda: engine.loaded_models[0].users)
    cancelled.cancel()
    with suppress(asyncio.CancelledError):
        await cancelled
    assert engine.loaded_models[0].users == 0
    # There is one place in the batch: a long answer in it would keep this one waiting.
    async with aclosing(engine.chat("house", GREEDY, model_folder)) as staying:
        await anext(staying)
        waiting = asyncio.create_task(engine.complete("house", {**GREEDY, "max_tokens": 3}, model_folder))
        await eventually_async(lambda: engine.loaded_models[0].users == 2)
        with pytest.raises(EngineBusy):
            await engine.complete("house", HELLO, model_folder)
        for _ in range(3):
            await anext(staying)
        assert not waiting.done()
    assert (await waiting)["usage"]["completion_tokens"] == 3


async def test_a_step_that_breaks_costs_only_those_in_it(
    engines: Engines, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engines.make()
    request = {**GREEDY, "max_tokens": 3}
    expected = content(await engine.complete("house", request, model_folder))

    def out_of_memory(*_: object) -> int:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as broken:
        broken.setattr(Sampling, "sample", out_of_memory)
        failed = await asyncio.gather(
            *(engine.complete("house", request, model_folder) for _ in range(2)), return_exceptions=True
        )
    assert all(isinstance(one, EngineFailed) and "out of memory" in str(one) for one in failed)
    assert content(await engine.complete("house", request, model_folder)) == expected


async def test_an_adapter_changes_the_answer(engines: Engines, model_folder: ModelFolder, adapted: ModelFolder) -> None:
    engine = engines.make()
    request = {**GREEDY, "max_tokens": 16}
    plain = content(await engine.complete("plain", request, model_folder))
    changed = content(await engine.complete("adapted", request, adapted))
    assert plain != changed
    base, adapter = Path(adapted.base_model), str(adapted.address)
    model: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    assert changed == by_generate(base, 16, model)[0]


async def test_in_4_bits(engines: Engines, model_folder: ModelFolder, adapted: ModelFolder) -> None:
    small, large = engines.make(load_in_4bit=True), engines.make()
    for source, name in ((model_folder, "plain"), (adapted, "adapted")):
        answer = await small.complete(name, {**GREEDY, "max_tokens": 8}, source)
        assert answer["usage"]["completion_tokens"] == 8
    await large.load("plain", model_folder)
    assert small.loaded_models[0].bytes < large.loaded_models[0].bytes


async def test_a_model_that_cannot_fit_is_refused_with_the_numbers(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make(memory_mb=64, slots=64)
    with pytest.raises(ModelTooLarge, match=r"house needs \d+ MB \(11 MB of weights, and 64 slots of 2048 tokens\)"):
        await engine.complete("house", HELLO, model_folder)
    assert engine.loaded_models == []


async def test_the_least_recently_used_makes_room(engines: Engines, model_folder: ModelFolder) -> None:
    probe = engines.make()
    await probe.load("one", model_folder)
    engine = engines.make(memory_mb=2 * probe.loaded_models[0].bytes // MB + 1)
    for name in ("one", "two", "one", "three"):
        await engine.load(name, model_folder)
    assert [held.reference for held in engine.loaded_models] == ["one", "three"]


async def test_a_long_conversation_is_refused(engines: Engines, model_folder: ModelFolder) -> None:
    engine = engines.make(context=256)
    long: EngineRequest = {"messages": [{"role": "user", "content": "Hello you " * 300}]}
    with pytest.raises(ContextExceeded, match=r"has \d{3,} tokens; with the answer, the model allows 256"):
        await engine.complete("house", long, model_folder)
    ended = await engine.complete("house", {**GREEDY, "logit_bias": [[1, -1000], [2, -1000]]}, model_folder)
    assert ended["usage"]["total_tokens"] == 256
    assert ended["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"response_format": {"type": "json_object"}}, "does not support response_format"),
        ({"mirostat": 2}, "does not support mirostat"),
        (
            {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
            "cannot force tool calls",
        ),
        ({"messages": [{"role": "user"}]}, "do not fit the model's template"),
        ({"prompt": ""}, "the prompt is empty"),
    ],
    ids=["schema", "option", "forced call", "no content", "nothing"],
)
async def test_what_cannot_be_heeded_is_refused(
    engines: Engines, model_folder: ModelFolder, extra: dict[str, Any], why: str
) -> None:
    engine = engines.make()
    with pytest.raises(RequestRefused, match=why):
        await engine.complete("house", {**HELLO, **extra}, model_folder)
    assert await engine.complete("house", {**HELLO, "max_tokens": 1}, model_folder)


async def test_a_folder_that_is_no_model_is_refused(engines: Engines, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelUnreadable, match="cannot read the model house"):
        await engines.make().complete("house", HELLO, ModelFolder(str(tmp_path), "forgearr/tiny", NOW))


async def test_embeddings(engines: Engines, model_folder: ModelFolder, folder: Path) -> None:
    engine = engines.make(context=256)
    found = await engine.embed("house", ["Hello", "Hello you"], model_folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    asked = tokenizer("Hello you", return_tensors="pt")["input_ids"]
    with torch.inference_mode():
        mean = model.base_model(asked).last_hidden_state[0].mean(0)
    assert found.vectors[1] == pytest.approx((mean / mean.norm()).tolist(), abs=1e-5)
    assert found.tokens == len(tokenizer("Hello")["input_ids"]) + asked.shape[1]
    with pytest.raises(TextTooLong):
        await engine.embed("house", ["Hello you " * 300], model_folder)


async def test_what_a_folder_says_of_itself(engines: Engines, model_folder: ModelFolder) -> None:
    header = await engines.make().describe("house", model_folder)
    assert (header.architecture, header.layers, header.hidden_size, header.context) == ("llama", 4, 256, 2048)
    assert header.kv_width == 2 * 2 * 64
    assert header.vocab_size == 2048
    assert "tool_call" in header.template


@pytest.mark.parametrize("text", ["Schöne Grüße 👋🏽 aus 東京!", "a\n\n b", " Hello, world "])
def test_letters_come_whole(folder: Path, text: str) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    letters = IncrementalDecoder(tokenizer.decode)
    told = [letters.feed(token) for token in tokenizer(text)["input_ids"]]
    assert "".join(told) == text
    assert not any(REPLACEMENT_CHARACTER in one for one in told)


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_calls_are_read(size: int) -> None:
    said = 'I look.\n<tool_call>\n{"name": "find", "arguments": {"title": "Dune"}}\n</tool_call>'
    speech = OutputParser([], with_tools=True)
    told = "".join(speech.feed(said[place : place + size]) for place in range(0, len(said), size))
    rest, (call,) = speech.flush()
    assert (told.strip(), rest) == ("I look.", "")
    assert call["function"] == {"name": "find", "arguments": '{"title": "Dune"}'}


def test_what_is_no_call_after_all_is_text() -> None:
    speech = OutputParser(["END"], with_tools=True)
    assert [speech.feed(part) for part in ("a <tool_", "call> nothing", " EN")] == ["a ", "", ""]
    assert speech.flush() == ("<tool_call> nothing EN", [])
